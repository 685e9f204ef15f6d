#include "norm/layer_norm.cuh"

namespace llamatelemetry {

Error launch_layer_norm(const LayerNormParams& p, Stream stream) {
  // By the row's size and alignment, never by how many rows there are: a row's bits do not depend
  // on the others.
  if (launch_layer_norm_warp(p, stream)) return last_launch_error();
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool wide =
        fits_wide_vectors<T>({p.x, p.weight, p.bias, p.out}, p.hidden_size, p.x_row_stride);
    with_block_row<T>(p.hidden_size, wide, [&](auto vector, auto held, unsigned num_threads) {
      using V = typename decltype(vector)::type;
      const auto launch = [&](auto kernel, int64_t rows) {
        const dim3 grid(static_cast<unsigned>((p.num_tokens + rows - 1) / rows));
        launch_overlapped(kernel, grid, num_threads, stream, p);
      };
      // Two rows a block where there are enough for every multiprocessor, and so long that weight
      // and bias are not in registers.
      if constexpr (held() == kMaxHeld && V::kElements > 1) {
        const bool whole = num_threads <= kFewWarps * kWarpSize &&
                           p.hidden_size == int64_t{num_threads} * held() * V::kElements;
        if (whole && p.weight && p.bias && p.num_tokens >= 8 * current_device().num_sms) {
          return launch(layer_norm_kernel<V, held(), 2>, 2);
        }
      }
      launch(layer_norm_kernel<V, held(), 1>, 1);
    });
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
