// out = (exp(lse_a) out_a + exp(lse_b) out_b) / (exp(lse_a) + exp(lse_b)), in float, beside the
// larger lse; a part that saw no key (-inf) adds nothing. Memory bound. One item a head of a token.
#include <cmath>

#include "attention/merge_params.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void merge_rows(const MergeStatesParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row % p.num_heads * p.num_tokens + row / p.num_heads;  // of lse
    const float lse_a = p.lse_a[at];
    const float lse_b = p.lse_b[at];
    const float largest = lse_a > lse_b ? lse_a : lse_b;
    const float weight_a = lse_a == -INFINITY ? 0.0f : expf(lse_a - largest);
    const float weight_b = lse_b == -INFINITY ? 0.0f : expf(lse_b - largest);
    const float sum = weight_a + weight_b;
    const Vec scale = vec_set(sum == 0.0f ? 0.0f : 1.0f / sum);
    const T* a = static_cast<const T*>(p.out_a) + row * p.head_dim;
    const T* b = static_cast<const T*>(p.out_b) + row * p.head_dim;
    T* out = static_cast<T*>(p.out) + row * p.head_dim;
    for_each_vec(p.head_dim, [=](int64_t i, auto lanes) {
      Vec value = vec_set(0.0f);  // NaN of nothing is nothing
      if (weight_a != 0.0f) value = value + vec_load(a + i, lanes) * vec_set(weight_a);
      if (weight_b != 0.0f) value = value + vec_load(b + i, lanes) * vec_set(weight_b);
      vec_store(out + i, lanes, value * scale);
    });
    p.lse[at] = sum == 0.0f ? -INFINITY : largest + logf(sum);
  }
}

void merge_items(const MergeStatesParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { merge_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_merge_attn_states(const MergeStatesParams& params, Stream) {
  const Work work{params.num_tokens * params.num_heads,
                  60.0 + 0.5 * static_cast<double>(params.head_dim)};
  parallel_over<merge_items>("merge_attn_states", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER_BF16(launch_merge_attn_states, MergeStatesParams)
