// Decode attention on CUDA, keys cut where the caller says. Apart from decode.cu so that they build
// in parallel.
#include "attention/decode/launch.cuh"

namespace llamatelemetry {

Error launch_decode_fixed(const AttentionParams& p, Stream stream) {
  return decode::launch_any_width<true>(p, stream);
}

}  // namespace llamatelemetry
