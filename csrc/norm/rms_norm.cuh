// out[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + eps) * (weight + offset) (Zhang & Sennrich 2019)
// and the same of residual[t, :] += x[t, :], where there is a residual.
// Bandwidth bound, or for a few rows bound by latency: one block per row, which stays in registers
// between the sum and the product.
// Grid [num_tokens].
#pragma once

#include "norm/block_row.cuh"
#include "norm/params.h"

namespace llamatelemetry {

template <typename V, int kHeld>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  using T = typename V::Element;
  const int64_t token = blockIdx.x;
  const auto hidden_size = static_cast<int>(p.hidden_size);
  let_successors_start();
  prefetch_row<V>(p.weight, hidden_size);
  wait_for_predecessors();

  BlockRow<V, kHeld> x(static_cast<const T*>(p.x) + token * p.x_row_stride, hidden_size);
  // Under way before the sum is known.
  const WeightRow<V, kHeld> weight(p.weight, hidden_size);
  if (p.residual) {
    T* sums = static_cast<T*>(p.residual) + token * p.residual_row_stride;
    const BlockRow<V, kHeld> residual(sums, hidden_size);
    x.for_each([&](int i, int h, V& value) {
      value = map_vector(residual.at(i, h), value, [](float r, float v) { return r + v; });
      reinterpret_cast<V*>(sums)[i] = value;
    });
    x.row = reinterpret_cast<const V*>(sums);
  }

  float sum = 0.0f;
  x.for_each([&](int, int, const V& value) {
#pragma unroll
    for (const T element : value.value) sum = fmaf(to_float(element), to_float(element), sum);
  });
  // torch multiplies by the reciprocal and takes the approximate root; so do we, to the bit.
  const float rstd = rsqrtf(block_sum(sum) * (1.0f / static_cast<float>(hidden_size)) + p.eps);

  V* out = reinterpret_cast<V*>(static_cast<T*>(p.out) + token * p.out_row_stride);
  if (p.weight_offset != 0.0f) {
    const float offset = p.weight_offset;
    x.for_each([&](int i, int h, const V& value) {
      out[i] = map_vector(value, weight.at(i, h),
                          [=](float v, float w) { return v * rstd * (w + offset); });
    });
    return;
  }
  x.for_each([&](int i, int h, const V& value) {
    const V normalised = map_vector(value, [=](float v) { return v * rstd; });
    out[i] = map_vector(normalised, weight.at(i, h), [](float n, float w) { return n * w; });
  });
}

}  // namespace llamatelemetry
