#include "norm/activation.cuh"

namespace llamatelemetry {
namespace {

constexpr int kNumThreads = 128;
constexpr int64_t kMaxGridY = 65535;

template <typename Function, typename V>
void start(const ActivationParams& p, Stream stream) {
  const int64_t blocks = (p.row_size / V::kElements + kNumThreads - 1) / kNumThreads;
  const dim3 grid(static_cast<unsigned>(p.num_rows),
                  static_cast<unsigned>(blocks < kMaxGridY ? blocks : kMaxGridY));
  launch_overlapped(activation_kernel<Function, V, kNumThreads>, grid, kNumThreads, stream, p);
}

template <typename Function>
void start(const ActivationParams& p, Stream stream) {
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

Error launch_activation(const ActivationParams& p, Stream stream) {
  switch (p.activation) {
    case Activation::kNone: return "an activation must be named";
    case Activation::kRelu: start<Relu>(p, stream); break;
    case Activation::kRelu2: start<Relu2>(p, stream); break;
    case Activation::kSilu: start<Silu>(p, stream); break;
    case Activation::kGelu: start<Gelu>(p, stream); break;
    case Activation::kGeluTanh: start<GeluTanh>(p, stream); break;
  }
  return last_launch_error();
}

}  // namespace llamatelemetry
