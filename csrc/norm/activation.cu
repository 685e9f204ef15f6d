#include "norm/activation.cuh"

namespace llamatelemetry {
namespace {

constexpr int kNumThreads = 128;
constexpr int64_t kMaxGridY = 65535;

template <typename V>
void start(const ActivationParams& p, Stream stream) {
  const int64_t blocks = (p.row_size / V::kElements + kNumThreads - 1) / kNumThreads;
  const dim3 grid(static_cast<unsigned>(p.num_rows),
                  static_cast<unsigned>(blocks < kMaxGridY ? blocks : kMaxGridY));
  launch_overlapped(activation_kernel<V, kNumThreads>, grid, kNumThreads, stream, p);
}

}  // namespace

Error launch_activation(const ActivationParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (fits_wide_vectors<T>({p.x, p.out}, p.row_size, p.x_row_stride)) {
      start<WideVector<T>>(p, stream);
    } else {
      start<Vector<T, 1>>(p, stream);
    }
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
