// out[r, :] = exp(y - max(y)) / sum(exp(y - max(y))) with y = x[r, :] / temperature, in float.
// Bound by exp, which out keeps between the passes if it holds floats; else it is computed twice.
// One item per row. A NaN, an inf or nothing but -inf gives NaN in the whole row and in no other.
#include "cpu/parallel.h"
#include "norm/params.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void softmax_rows(const SoftmaxParams& p, int64_t begin, int64_t end) {
  constexpr bool kOutKeepsFloats = sizeof(T) == sizeof(float);
  const Vec temperature = vec_set(p.temperature);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
    T* out = static_cast<T*>(p.out) + row * p.row_size;
    const Vec largest = fold_row(
        p.row_size, vec_set(-INFINITY),
        [=](Vec acc, int64_t i, auto lanes) {
          return vec_max(acc, vec_load(x + i, lanes, -INFINITY));
        },
        [](Vec a, Vec b) { return vec_max(a, b); });
    // Division is monotonic, so this is the largest quotient too.
    const Vec max = vec_set(vec_reduce_max(largest)) / temperature;
    const auto power = [=](int64_t i, auto lanes) {
      return vec_exp(vec_load(x + i, lanes, -INFINITY) / temperature - max);
    };
    const float sum = sum_row(p.row_size, [=](Vec acc, int64_t i, auto lanes) {
      const Vec value = power(i, lanes);
      if constexpr (kOutKeepsFloats) vec_store(out + i, lanes, value);
      return acc + value;
    });
    const Vec scale = vec_set(1.0f / sum);
    for_each_vec(p.row_size, [=](int64_t i, auto lanes) {
      const Vec value = kOutKeepsFloats ? vec_load(out + i, lanes) : power(i, lanes);
      vec_store(out + i, lanes, value * scale);
    });
  }
}

void softmax_items(const SoftmaxParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { softmax_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_softmax(const SoftmaxParams& params, Stream) {
  const Work work{params.num_rows, 20.0 + 1.5 * static_cast<double>(params.row_size)};
  parallel_over<softmax_items>("softmax", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_softmax, SoftmaxParams)
