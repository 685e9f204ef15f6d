// The shapes of flash_attn's tiles from compute capability 8.0 on.
#include "attention/flash_fwd.h"
#include "attention/flash_fwd_sm80.cuh"
#include "common/device.h"

namespace llamatelemetry {
namespace {

// 4 warps of 32 rows and 2 blocks on a multiprocessor where accumulators fit: a block's copies and
// softmax hide under the other's products. The large tiles have fewer barriers and copies a key;
// they run where two blocks of them, or one where blocks says 1, fit a multiprocessor.
// benchmarks/NOTES.md has what each was measured to give.
template <typename T>
Error launch(const FlashAttnParams& p, Stream stream) {
  // head_dim, warps, 16-row tiles a warp, keys, scored keys, held steps, blocks
  using Large64 = FlashFwdSm80<T, 64, 4, 2, 128, 64, 4, 2>;
  using Small64 = FlashFwdSm80<T, 64, 4, 2, 64, 64, 4, 2>;
  using Any96 = FlashFwdSm80<T, 96, 4, 2, 64, 64, 0, 2>;
  using Large128 = FlashFwdSm80<T, 128, 4, 2, 64, 32, 0, 2>;  // 64 scored keys would spill
  using Small128 = FlashFwdSm80<T, 128, 4, 2, 32, 32, 0, 2>;
  using Large256 = FlashFwdSm80<T, 256, 8, 1, 64, 64, 0, 1>;
  using Small256 = FlashFwdSm80<T, 256, 4, 1, 32, 32, 0, 2>;
  const auto with = [&](auto kernel) {
    return launch_flash_kernel<typename decltype(kernel)::type>(p, kSectionBytes, stream);
  };
  const auto with_largest = [&](auto large, auto small) {
    using Large = typename decltype(large)::type;
    const bool fits = current_device().max_shared_bytes >= Large::kSharedBytes * Large::kMinBlocks;
    return fits ? with(large) : with(small);
  };
  if (p.head_dim <= 64) return with_largest(Type<Large64>{}, Type<Small64>{});
  if (p.head_dim <= 96) return with(Type<Any96>{});
  if (p.head_dim <= 128) return with_largest(Type<Large128>{}, Type<Small128>{});
  return with_largest(Type<Large256>{}, Type<Small256>{});
}

}  // namespace

Error launch_flash_fwd_sm80(const FlashAttnParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch<Half>(p, stream) : launch<BFloat16>(p, stream);
}

}  // namespace llamatelemetry
