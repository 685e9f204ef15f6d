#include "gemm/quant_stream_launch.cuh"

namespace llamatelemetry {

Error launch_quant_stream_wide_f16(const QuantLinearParams& p, Stream stream) {
  return launch_quant_stream<Half, StreamSet::kWide>(p, stream);
}

}  // namespace llamatelemetry
