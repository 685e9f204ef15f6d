// out[t, :] = (x[t, :] - mean) / sqrt(variance + eps) * weight + bias       (Ba et al. 2016)
// The variance is the mean of squared distances from the mean, in a second pass over registers: no
// cancellation, whatever the mean. Bandwidth bound: one block per row. Grid [num_tokens].
#pragma once

#include "norm/block_row.cuh"
#include "norm/params.h"

namespace llamatelemetry {

template <typename V, int kHeld>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    layer_norm_kernel(const __grid_constant__ LayerNormParams p) {
  using T = typename V::Element;
  const int64_t token = blockIdx.x;
  const auto hidden_size = static_cast<int>(p.hidden_size);
  const auto size = static_cast<float>(p.hidden_size);
  let_successors_start();
  prefetch_row<V>(p.weight, hidden_size);
  prefetch_row<V>(p.bias, hidden_size);
  wait_for_predecessors();

  BlockRow<V, kHeld> x(static_cast<const T*>(p.x) + token * p.x_row_stride, hidden_size);
  float sum = 0.0f;
  x.for_each([&](int, int, const V& value) {
#pragma unroll
    for (const T element : value.value) sum += to_float(element);
  });
  const float mean = block_sum(sum) / size;
  float squares = 0.0f;
  x.for_each([&](int, int, const V& value) {
#pragma unroll
    for (const T element : value.value) {
      const float distance = to_float(element) - mean;
      squares = fmaf(distance, distance, squares);
    }
  });
  const float rstd = rsqrtf(block_sum(squares) / size + p.eps);

  const V* weight = static_cast<const V*>(p.weight);
  const V* bias = static_cast<const V*>(p.bias);
  V* out = reinterpret_cast<V*>(static_cast<T*>(p.out) + token * p.hidden_size);
  x.for_each([&](int i, int, const V& value) {
    const V w = weight ? weight[i] : V{};
    const V b = bias ? bias[i] : V{};
    V result;
#pragma unroll
    for (int e = 0; e < V::kElements; ++e) {
      float y = (to_float(value.value[e]) - mean) * rstd;
      if (weight) y *= to_float(w.value[e]);
      if (bias) y += to_float(b.value[e]);
      result.value[e] = from_float<T>(y);
    }
    out[i] = result;
  });
}

}  // namespace llamatelemetry
