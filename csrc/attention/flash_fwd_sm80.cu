// The shapes of flash_attn's tiles from compute capability 8.0 on.
#include "attention/flash_fwd.h"
#include "attention/flash_fwd_sm80.cuh"

namespace llamatelemetry {
namespace {

// Keys and values of the heads that are worked on together, at most: a part of an A100's L2.
constexpr int64_t kSectionBytes = 16 << 20;

template <typename T>
Error launch(const FlashAttnParams& p, Stream stream) {
  const auto with = [&](auto kernel) {
    return launch_flash_kernel<typename decltype(kernel)::type>(p, kSectionBytes, stream);
  };
  // head_dim, warps, 16-row tiles a warp, keys, blocks on a multiprocessor
  if (p.head_dim <= 64) return with(Type<FlashFwdSm80<T, 64, 4, 2, 64, false, 2>>{});
  if (p.head_dim <= 96) return with(Type<FlashFwdSm80<T, 96, 4, 2, 64, false, 2>>{});
  if (p.head_dim <= 128) return with(Type<FlashFwdSm80<T, 128, 4, 2, 64, false, 2>>{});
  return with(Type<FlashFwdSm80<T, 256, 4, 1, 32, false, 2>>{});
}

}  // namespace

Error launch_flash_fwd_sm80(const FlashAttnParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch<Half>(p, stream) : launch<BFloat16>(p, stream);
}

}  // namespace llamatelemetry
