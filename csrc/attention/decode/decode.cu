// Decode attention on CUDA, the keys of the batch shared evenly.
#include "attention/decode/launch.cuh"

namespace llamatelemetry {

Error launch_decode(const AttentionParams& p, Stream stream) {
#ifdef LT_SM90
  if (p.plan.cluster_blocks > 0) return launch_decode_cluster(p, stream);
#endif
  if (p.k.dtype == DType::kFloat8E4M3) return launch_decode_e4m3(p, stream);
  if (p.k.dtype == DType::kInt8) return launch_decode_int8(p, stream);
  if (p.plan.is_wide) return launch_decode_wide(p, stream);
  return p.plan.fixed_splits ? launch_decode_fixed(p, stream)
                             : decode::launch_any_width<false>(p, stream);
}

}  // namespace llamatelemetry
