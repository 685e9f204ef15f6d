// Decode attention on CUDA for more rows of a key head than a warp multiplies: drafts that are
// verified, short chunks.
#include "attention/decode/launch.cuh"

namespace llamatelemetry {

Error launch_decode_wide(const AttentionParams& p, Stream stream) {
  return decode::launch_wide(p, stream);
}

}  // namespace llamatelemetry
