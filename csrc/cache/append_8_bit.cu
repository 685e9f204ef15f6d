#include "cache/append_8_bit.cuh"

namespace llamatelemetry {

Error launch_append_8_bit(const AppendKvParams& p, Stream stream) {
  constexpr int kNumWarps = 4;
  const int64_t warps = 2 * p.num_tokens * p.num_heads;
  const dim3 grid(static_cast<unsigned>((warps + kNumWarps - 1) / kNumWarps));
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    append_8_bit_kernel<T, kNumWarps><<<grid, kNumWarps * kWarpSize, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
