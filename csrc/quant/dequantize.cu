#include "quant/dequantize.cuh"

namespace llamatelemetry {

Error launch_dequantize(const DequantizeParams& p, Stream stream) {
  if (is_low_bit(kFormats[p.format].codes)) return launch_dequantize_low_bit(p, stream);
  return launch_dequantize_of<FormatSet::kWide>(p, stream);
}

}  // namespace llamatelemetry
