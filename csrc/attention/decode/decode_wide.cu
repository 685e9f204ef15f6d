// Decode attention on CUDA for more rows of a key head than a warp multiplies: drafts that are
// verified, short chunks.
#include "attention/decode/launch.cuh"

namespace llamatelemetry {

Error launch_decode_wide(const AttentionParams& p, Stream stream) {
  using namespace decode;
#ifdef LT_SM90
  if (p.plan.by_warpgroups) return launch_decode_wide_sm90(p, stream);
#endif
  if (p.head_dim <= 64) return launch<kWideConfigs[0], false>(p, stream);
  if (p.head_dim <= 96) return launch<kWideConfigs[1], false>(p, stream);
  return launch<kWideConfigs[2], false>(p, stream);
}

}  // namespace llamatelemetry
