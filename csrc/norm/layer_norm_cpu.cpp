// out[t, :] = (x[t, :] - mean) / sqrt(variance + eps) * (weight + offset) + bias (Ba et al. 2016)
// The mean is that of the distances from a first mean, which a long sum may have put beside it; the
// variance is the mean of squared distances from the mean, each in a pass over L1: no cancellation,
// whatever the mean. One item per token. All in float, rounded once, as torch does.
#include "cpu/parallel.h"
#include "norm/params.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void layer_norm_rows(const LayerNormParams& p, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const T*>(p.weight);
  const auto* bias = static_cast<const T*>(p.bias);
  const auto size = static_cast<float>(p.hidden_size);
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
    T* out = static_cast<T*>(p.out) + token * p.hidden_size;
    const float first =
        sum_row(p.hidden_size,
                [=](Vec acc, int64_t i, auto lanes) { return acc + vec_load(x + i, lanes); }) /
        size;
    const Vec firsts = vec_set(first);
    const float mean = first + sum_row(p.hidden_size, [=](Vec acc, int64_t i, auto lanes) {
                                 return acc + (vec_load(x + i, lanes, first) - firsts);
                               }) / size;
    const Vec means = vec_set(mean);
    const float variance = sum_row(p.hidden_size,
                                   [=](Vec acc, int64_t i, auto lanes) {
                                     const Vec distance = vec_load(x + i, lanes, mean) - means;
                                     return vec_fma(distance, distance, acc);
                                   }) /
                           size;
    const Vec rstd = vec_set(1.0f / std::sqrt(variance + p.eps));
    const Vec offset = vec_set(p.weight_offset);
    for_each_vec(p.hidden_size, [=](int64_t i, auto lanes) {
      Vec value = (vec_load(x + i, lanes) - means) * rstd;
      if (weight) value = value * (vec_load(weight + i, lanes) + offset);
      if (bias) value = value + vec_load(bias + i, lanes);
      vec_store(out + i, lanes, value);
    });
  }
}

void layer_norm_items(const LayerNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { layer_norm_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_layer_norm(const LayerNormParams& params, Stream) {
  const Work work{params.num_tokens, 20.0 + 0.3 * static_cast<double>(params.hidden_size)};
  parallel_over<layer_norm_items>("layer_norm", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_layer_norm, LayerNormParams)
