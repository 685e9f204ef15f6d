// Decode attention on CUDA over caches of int8. Apart from decode.cu so that they build in
// parallel.
#include "attention/decode/launch.cuh"

namespace llamatelemetry {

Error launch_decode_int8(const AttentionParams& p, Stream stream) {
  return decode::launch_8_bit<decode::kInt8Configs>(p, stream);
}

}  // namespace llamatelemetry
