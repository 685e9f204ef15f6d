#include "norm/gated_activation.cuh"

namespace llamatelemetry {
namespace {

constexpr int kNumThreads = 128;
constexpr int64_t kMaxGridY = 65535;

template <typename Function, typename V>
void start(const GatedActivationParams& p, Stream stream) {
  const int64_t blocks = (p.row_size / V::kElements + kNumThreads - 1) / kNumThreads;
  const dim3 grid(static_cast<unsigned>(p.num_rows),
                  static_cast<unsigned>(blocks < kMaxGridY ? blocks : kMaxGridY));
  launch_overlapped(gated_activation_kernel<Function, V, kNumThreads>, grid, kNumThreads, stream,
                    p);
}

template <typename Function>
void start(const GatedActivationParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (fits_wide_vectors<T>({p.x, p.out}, p.row_size, p.x_row_stride)) {
      start<Function, WideVector<T>>(p, stream);
    } else {
      start<Function, Vector<T, 1>>(p, stream);
    }
  });
}

}  // namespace

Error launch_gated_activation(const GatedActivationParams& p, Stream stream) {
  switch (p.activation) {
    case Activation::kSilu: start<Silu>(p, stream); break;
    case Activation::kGelu: start<Gelu>(p, stream); break;
    case Activation::kGeluTanh: start<GeluTanh>(p, stream); break;
    default: break;  // no op asks for the others
  }
  return last_launch_error();
}

}  // namespace llamatelemetry
