// out[r, i] = activation(x[r, i]) * x[r, row_size + i], the activation rounded to T before the
// product, as act_fn(gate) * up rounds it. An item is a run of kItemSize columns of one row, so
// that a single wide row keeps several cores busy.
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
void gated_activation_runs(const GatedActivationParams& p, int64_t begin, int64_t end) {
  const int64_t runs_per_row = (p.row_size + kItemSize - 1) / kItemSize;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / runs_per_row;
    const int64_t first = item % runs_per_row * kItemSize;
    const T* gate = static_cast<const T*>(p.x) + row * p.x_row_stride + first;
    const T* up = gate + p.row_size;
    T* out = static_cast<T*>(p.out) + row * p.row_size + first;
    for_each_vec(smaller(kItemSize, p.row_size - first), [=](int64_t i, auto lanes) {
      const Vec activated = vec_rounded_to<T>(Function::of(vec_load(gate + i, lanes)));
      vec_store(out + i, lanes, activated * vec_load(up + i, lanes));
    });
  }
}

void gated_activation_items(const GatedActivationParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (p.activation) {
      case Activation::kSilu: return gated_activation_runs<Silu, T>(p, begin, end);
      case Activation::kGelu: return gated_activation_runs<Gelu, T>(p, begin, end);
      case Activation::kGeluTanh: return gated_activation_runs<GeluTanh, T>(p, begin, end);
      default: break;  // no op asks for the others
    }
  });
}

const char* name_of(Activation activation) {
  switch (activation) {
    case Activation::kSilu: return "silu_and_mul";
    case Activation::kGelu: return "gelu_and_mul";
    default: break;
  }
  return "gelu_tanh_and_mul";
}

}  // namespace

Error launch_gated_activation(const GatedActivationParams& params, Stream) {
  const int64_t runs_per_row = (params.row_size + kItemSize - 1) / kItemSize;
  const auto columns = static_cast<double>(smaller(kItemSize, params.row_size));
  const Work work{params.num_rows * runs_per_row, 20.0 + 1.0 * columns};
  parallel_over<gated_activation_items>(name_of(params.activation), work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_gated_activation, GatedActivationParams)
