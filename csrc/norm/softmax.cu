#include "norm/softmax.cuh"

namespace llamatelemetry {

Error launch_softmax(const SoftmaxParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool wide = fits_wide_vectors<T>({p.x, p.out}, p.row_size, p.x_row_stride);
    with_block_row<T>(p.row_size, wide, [&](auto vector, auto held, unsigned num_threads) {
      launch_overlapped(softmax_kernel<typename decltype(vector)::type, held()>,
                        dim3(static_cast<unsigned>(p.num_rows)), num_threads, stream, p);
    });
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
