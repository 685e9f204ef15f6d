#include "norm/rms_norm.cuh"

namespace llamatelemetry {

Error launch_rms_norm(const RmsNormParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool wide = fits_wide_vectors<T>({p.x, p.residual, p.weight, p.out}, p.hidden_size,
                                           p.x_row_stride, p.residual_row_stride, p.out_row_stride);
    with_block_row<T>(p.hidden_size, wide, [&](auto vector, auto held, unsigned num_threads) {
      launch_overlapped(rms_norm_kernel<typename decltype(vector)::type, held()>,
                        dim3(static_cast<unsigned>(p.num_tokens)), num_threads, stream, p);
    });
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
