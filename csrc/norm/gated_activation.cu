#include "norm/gated_activation.cuh"

namespace llamatelemetry {
namespace {

constexpr int kNumThreads = 256;

template <typename Function>
void start(const GatedActivationParams& p, Stream stream) {
  const auto blocks_per_row = static_cast<unsigned>((p.row_size + kNumThreads - 1) / kNumThreads);
  const dim3 grid(static_cast<unsigned>(p.num_rows),
                  blocks_per_row < 65535 ? blocks_per_row : 65535);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    gated_activation_kernel<Function, T, kNumThreads><<<grid, kNumThreads, 0, stream>>>(p);
  });
}

}  // namespace

Error launch_gated_activation(const GatedActivationParams& p, Stream stream) {
  switch (p.activation) {
    case Activation::kSilu: start<Silu>(p, stream); break;
    case Activation::kGelu: start<Gelu>(p, stream); break;
    case Activation::kGeluTanh: start<GeluTanh>(p, stream); break;
  }
  return last_launch_error();
}

}  // namespace llamatelemetry
