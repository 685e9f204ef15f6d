// Decode attention on CUDA over caches of float8_e4m3. Apart from decode.cu so that they build in
// parallel.
#include "attention/decode/launch.cuh"

namespace llamatelemetry {

Error launch_decode_e4m3(const AttentionParams& p, Stream stream) {
  return decode::launch_8_bit<decode::kE4M3Configs>(p, stream);
}

}  // namespace llamatelemetry
