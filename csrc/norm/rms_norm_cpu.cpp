// out[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + eps) * weight          (Zhang & Sennrich 2019)
// Bandwidth bound: a row is read from memory once and from L1 the second time. One item per token.
// Normalises in float, rounds to T, multiplies by the weight in T: the roundings of transformers.
#include "common/parallel.h"
#include "norm/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
float sum_of_squares(const T* x, int64_t size) {
  Vec sum[4] = {vec_set(0), vec_set(0), vec_set(0), vec_set(0)};
  int64_t i = 0;
  for (; i + 4 * Vec::kLanes <= size; i += 4 * Vec::kLanes) {
    for (int u = 0; u < 4; ++u) {
      const Vec value = vec_load(x + i + u * Vec::kLanes);
      sum[u] = vec_fma(value, value, sum[u]);
    }
  }
  for (; i < size; i += Vec::kLanes) {
    const int64_t left = size - i;
    const Vec value = left >= Vec::kLanes ? vec_load(x + i) : vec_load_first(x + i, left);
    sum[0] = vec_fma(value, value, sum[0]);
  }
  return vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename T>
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const T*>(p.weight);
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
    T* out = static_cast<T*>(p.out) + token * p.hidden_size;
    const float mean = sum_of_squares(x, p.hidden_size) / static_cast<float>(p.hidden_size);
    const Vec rstd = vec_set(1.0f / std::sqrt(mean + p.eps));
    int64_t i = 0;
    for (; i + Vec::kLanes <= p.hidden_size; i += Vec::kLanes) {
      const Vec normalised = vec_rounded_to<T>(vec_load(x + i) * rstd);
      vec_store(out + i, normalised * vec_load(weight + i));
    }
    if (const auto left = static_cast<int>(p.hidden_size - i); left > 0) {
      const Vec normalised = vec_rounded_to<T>(vec_load_first(x + i, left) * rstd);
      vec_store_first(out + i, left, normalised * vec_load_first(weight + i, left));
    }
  }
}

void rms_norm_items(const RmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { rms_norm_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_rms_norm(const RmsNormParams& params, Stream) {
  const Work work{params.num_tokens, 20.0 + 0.2 * static_cast<double>(params.hidden_size)};
  parallel_over<rms_norm_items>("rms_norm", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_rms_norm, RmsNormParams)
