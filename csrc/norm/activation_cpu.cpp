// out[r, i] = activation(x[r, i]), in float and rounded once. An item is a run of kItemSize columns
// of one row, so that a single wide row keeps several cores busy.
#include "cpu/parallel.h"
#include "norm/params.h"
#include "vec/activation.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int64_t kItemSize = 2048;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename Function, typename T>
void activation_runs(const ActivationParams& p, int64_t begin, int64_t end) {
  const int64_t runs_per_row = (p.row_size + kItemSize - 1) / kItemSize;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / runs_per_row;
    const int64_t first = item % runs_per_row * kItemSize;
    const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride + first;
    T* out = static_cast<T*>(p.out) + row * p.row_size + first;
    for_each_vec(smaller(kItemSize, p.row_size - first), [=](int64_t i, auto lanes) {
      vec_store(out + i, lanes, Function::of(vec_load(x + i, lanes)));
    });
  }
}

void activation_items(const ActivationParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (p.activation) {
      case Activation::kNone: break;  // launch_activation refuses it
      case Activation::kRelu: return activation_runs<Relu, T>(p, begin, end);
      case Activation::kRelu2: return activation_runs<Relu2, T>(p, begin, end);
      case Activation::kSilu: return activation_runs<Silu, T>(p, begin, end);
      case Activation::kGelu: return activation_runs<Gelu, T>(p, begin, end);
      case Activation::kGeluTanh: return activation_runs<GeluTanh, T>(p, begin, end);
    }
  });
}

}  // namespace

Error launch_activation(const ActivationParams& params, Stream) {
  if (params.activation == Activation::kNone) return "an activation must be named";
  const int64_t runs_per_row = (params.row_size + kItemSize - 1) / kItemSize;
  const auto columns = static_cast<double>(smaller(kItemSize, params.row_size));
  const Work work{params.num_rows * runs_per_row, 20.0 + 1.0 * columns};
  parallel_over<activation_items>("activation", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_activation, ActivationParams)
