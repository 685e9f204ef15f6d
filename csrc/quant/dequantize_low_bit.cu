#include "quant/dequantize.cuh"

namespace llamatelemetry {

Error launch_dequantize_low_bit(const DequantizeParams& p, Stream stream) {
  return launch_dequantize_of<FormatSet::kLowBit>(p, stream);
}

}  // namespace llamatelemetry
