// What follows the product of linear, and as a kernel over what torch's matmul gave.
#pragma once

#include "gemm/params.h"
#include "tile/activation.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry {

// y becomes out[row, column ...]; it has the bias and is rounded. up: where gated, the other half.
template <typename V>
__device__ inline void finish(const LinearEpilogue& e, int64_t row, int64_t column, const V& up,
                              V& y) {
  using T = typename V::Element;
  if (e.activation != Activation::kNone) {
    y = map_vector(y, [&](float value) { return activated(e.activation, value); });
  }
  if (e.gated) y = map_vector(y, up, [](float a, float b) { return a * b; });
  if (e.residual != nullptr) {
    const T* residual = static_cast<const T*>(e.residual) + row * e.residual_row_stride + column;
    const V sum = *reinterpret_cast<const V*>(residual);  // in one load
    y = map_vector(sum, y, [](float a, float b) { return a + b; });
  }
}

// Bound by bandwidth; a thread has one vector. Grid [m, blocks of a row], block kNumThreads.
template <typename V, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    linear_epilogue_kernel(const __grid_constant__ LinearEpilogueParams p) {
  using T = typename V::Element;
  let_successors_start();
  wait_for_predecessors();
  const int64_t row = blockIdx.x;
  const int64_t columns = p.epilogue.gated ? 2 * p.out_n : p.out_n;
  const T* y = static_cast<const T*>(p.y) + row * columns;
  T* out = static_cast<T*>(p.out) + row * p.out_n;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kNumThreads * V::kElements;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.y) * kNumThreads + threadIdx.x) * V::kElements;
  for (int64_t column = first; column < p.out_n; column += step) {
    V values = *reinterpret_cast<const V*>(y + column);
    V up{};
    if (p.epilogue.gated) up = *reinterpret_cast<const V*>(y + p.out_n + column);
    finish(p.epilogue, row, column, up, values);
    *reinterpret_cast<V*>(out + column) = values;
  }
}

}  // namespace llamatelemetry
