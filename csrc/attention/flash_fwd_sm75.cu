// The shapes of flash_attn's tiles on compute capability 7.5.
#include "attention/flash_fwd.h"
#include "attention/flash_fwd_sm75.cuh"

namespace llamatelemetry {

Error launch_flash_fwd_sm75(const FlashAttnParams& p, Stream stream) {
  // Keys and values of the heads that are worked on together, at most: half of a T4's L2.
  constexpr int64_t kSectionBytes = 2 << 20;
  const auto with = [&](auto kernel) {
    return launch_flash_kernel<typename decltype(kernel)::type>(p, kSectionBytes, stream);
  };
  // head_dim, 16-row tiles a warp, keys
  if (p.head_dim <= 64) return with(Type<FlashFwdSm75<64, 2, 64>>{});
  if (p.head_dim <= 96) return with(Type<FlashFwdSm75<96, 1, 64>>{});
  if (p.head_dim <= 128) return with(Type<FlashFwdSm75<128, 1, 64>>{});
  return with(Type<FlashFwdSm75<256, 1, 16>>{});
}

}  // namespace llamatelemetry
