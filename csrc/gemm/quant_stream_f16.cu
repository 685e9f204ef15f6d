#include "gemm/quant_stream_launch.cuh"

namespace llamatelemetry {

Error launch_quant_stream_f16(const QuantLinearParams& p, Stream stream) {
  return launch_quant_stream<Half, StreamSet::kNibbles>(p, stream);
}

}  // namespace llamatelemetry
