#include "gemm/quant_linear.cuh"

namespace llamatelemetry {

Error launch_quant_linear_low_bit(const QuantLinearParams& p, Stream stream) {
  return launch_quant_linear_of<FormatSet::kLowBit>(p, stream);
}

}  // namespace llamatelemetry
