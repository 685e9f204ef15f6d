// out[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + eps) * (weight + offset) (Zhang & Sennrich 2019)
// and the same of residual[t, :] += x[t, :], where there is a residual.
// Bandwidth bound: a row is read from memory once and from L1 the second time. One item per token.
// Normalises in float, rounds to T, multiplies by the weight in T: the roundings of transformers;
// with an offset rounds once, as its modules that have one.
#include "cpu/parallel.h"
#include "norm/params.h"
#include "vec/row_ops.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const T*>(p.weight);
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
    T* out = static_cast<T*>(p.out) + token * p.out_row_stride;
    if (p.residual) {
      T* residual = static_cast<T*>(p.residual) + token * p.residual_row_stride;
      for_each_vec(p.hidden_size, [=](int64_t i, auto lanes) {
        vec_store(residual + i, lanes, vec_load(residual + i, lanes) + vec_load(x + i, lanes));
      });
      x = residual;
    }
    rms_norm_row(x, weight, p.hidden_size, p.eps, p.weight_offset, out);
  }
}

void rms_norm_items(const RmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { rms_norm_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_rms_norm(const RmsNormParams& params, Stream) {
  const Work work{params.num_tokens, 20.0 + 0.2 * static_cast<double>(params.hidden_size)};
  parallel_over<rms_norm_items>(params.residual ? "fused_add_rms_norm_" : "rms_norm", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_rms_norm, RmsNormParams)
