#include "gemm/quant_skinny_launch.cuh"

namespace llamatelemetry {

Error launch_quant_skinny_groups_f16(const QuantLinearParams& p, Stream stream) {
  return launch_quant_skinny<Half, FormatSet::kGroups>(p, stream);
}

}  // namespace llamatelemetry
