#include "gemm/quant_skinny_launch.cuh"

namespace llamatelemetry {

Error launch_quant_skinny_groups_bf16(const QuantLinearParams& p, Stream stream) {
  return launch_quant_skinny<BFloat16, FormatSet::kGroups>(p, stream);
}

}  // namespace llamatelemetry
