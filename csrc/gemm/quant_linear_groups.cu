#include "gemm/quant_linear.cuh"

namespace llamatelemetry {

Error launch_quant_linear_groups(const QuantLinearParams& p, Stream stream) {
  return launch_quant_linear_of<FormatSet::kGroups>(p, stream);
}

}  // namespace llamatelemetry
