// out[r, :] = exp(y - max(y)) / sum(exp(y - max(y))) with y = x[r, :] / temperature, in float.
// One block per row, which stays in registers as far as they go; exp is computed again when the row
// is written rather than kept. A NaN, an inf or nothing but -inf gives NaN in the whole row and in
// no other. Grid [num_rows].
#pragma once

#include "norm/block_row.cuh"
#include "norm/params.h"

namespace llamatelemetry {

template <typename V, int kHeld>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    softmax_kernel(const __grid_constant__ SoftmaxParams p) {
  using T = typename V::Element;
  const int64_t r = blockIdx.x;
  let_successors_start();
  wait_for_predecessors();

  BlockRow<V, kHeld> x(static_cast<const T*>(p.x) + r * p.x_row_stride,
                       static_cast<int>(p.row_size));
  float max = -INFINITY;
  x.for_each([&](int, int, const V& value) {
#pragma unroll
    for (const T element : value.value) max = fmaxf(max, to_float(element));
  });
  max = block_max(max) / p.temperature;  // division is monotonic: the largest quotient too
  const auto power = [&](float v) { return expf(v / p.temperature - max); };
  float sum = 0.0f;
  x.for_each([&](int, int, const V& value) {
#pragma unroll
    for (const T element : value.value) sum += power(to_float(element));
  });
  sum = block_sum(sum);

  V* out = reinterpret_cast<V*>(static_cast<T*>(p.out) + r * p.row_size);
  x.for_each([&](int i, int, const V& value) {
    out[i] = map_vector(value, [&](float v) { return power(v) / sum; });
  });
}

}  // namespace llamatelemetry
