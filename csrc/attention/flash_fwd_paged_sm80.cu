// flash_attn's kernel for compute capability 8.0 and later over keys and values in pages. Apart
// from flash_fwd_sm80.cu because looking pages up takes registers that its tiles do not have to
// spare.
#include "attention/flash_fwd.h"
#include "attention/flash_fwd_sm80.cuh"

namespace llamatelemetry {
namespace {

template <typename T>
Error launch(const FlashAttnParams& p, Stream stream) {
  const auto with = [&](auto kernel) {
    return launch_flash_kernel<typename decltype(kernel)::type>(p, kSectionBytes, stream);
  };
  // head_dim, warps, 16-row tiles a warp, keys, scored keys, held steps, blocks: tiles that leave
  // registers over
  if (p.head_dim <= 64) return with(Type<FlashFwdSm80<T, 64, 4, 2, 64, 32, 0, 2, true>>{});
  if (p.head_dim <= 128) return with(Type<FlashFwdSm80<T, 128, 4, 2, 32, 32, 0, 2, true>>{});
  return with(Type<FlashFwdSm80<T, 256, 4, 1, 32, 32, 0, 2, true>>{});
}

}  // namespace

Error launch_flash_fwd_paged_sm80(const FlashAttnParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch<Half>(p, stream) : launch<BFloat16>(p, stream);
}

}  // namespace llamatelemetry
