// Launching warpgroup.cuh: decode attention on Hopper for more rows of a key head than a warp
// multiplies.
#include "attention/decode/launch.cuh"
#include "attention/decode/warpgroup.cuh"

namespace llamatelemetry {

// The grid, and what choice.h lets pass, are of kConfig's blocks, which are smaller: on Hopper as
// many of these fit a multiprocessor's 228 KB, of which 1 KB of each is the system's.
template <typename Kernel>
constexpr bool kFits = Kernel::kMinBlocks * (Kernel::kSharedBytes + 1024) <= 228 * 1024;

template <decode::Config kConfig>
static Error launch_warpgroup(const AttentionParams& p, Stream stream) {
  using namespace decode;
  static_assert(kFits<WarpgroupDecode<Half, kConfig>> && kFits<WarpgroupDecode<BFloat16, kConfig>>);
  return p.dtype == DType::kFloat16 ? launch<WarpgroupDecode<Half, kConfig>>(p, stream)
                                    : launch<WarpgroupDecode<BFloat16, kConfig>>(p, stream);
}

Error launch_decode_wide_sm90(const AttentionParams& p, Stream stream) {
  using namespace decode;
  if (p.head_dim <= 64) return launch_warpgroup<kWideConfigs[0]>(p, stream);
  if (p.head_dim <= 96) return launch_warpgroup<kWideConfigs[1]>(p, stream);
  return launch_warpgroup<kWideConfigs[2]>(p, stream);
}

}  // namespace llamatelemetry
