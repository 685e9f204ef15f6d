#include "gemm/quant_skinny_launch.cuh"

namespace llamatelemetry {

Error launch_quant_skinny_low_bit_f16(const QuantLinearParams& p, Stream stream) {
  return launch_quant_skinny<Half, FormatSet::kLowBit>(p, stream);
}

}  // namespace llamatelemetry
