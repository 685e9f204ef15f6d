// Decode attention on CUDA, the keys of the batch shared evenly.
#include "attention/decode/launch.cuh"

namespace llamatelemetry {

Error launch_decode(const AttentionParams& p, Stream stream) {
  return p.plan.fixed_splits ? launch_decode_fixed(p, stream)
                             : decode::launch_any_width<false>(p, stream);
}

}  // namespace llamatelemetry
