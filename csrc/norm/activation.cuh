// out[r, i] = Function(x[r, i]), in float and rounded once. Bandwidth bound: a thread has one
// vector.
// Grid [num_rows, blocks a row], block kNumThreads.
#pragma once

#include "norm/params.h"
#include "tile/activation.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry {

template <typename Function, typename V, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    activation_kernel(const __grid_constant__ ActivationParams p) {
  using T = typename V::Element;
  const int64_t row = blockIdx.x;
  const V* x = reinterpret_cast<const V*>(static_cast<const T*>(p.x) + row * p.x_row_stride);
  V* out = reinterpret_cast<V*>(static_cast<T*>(p.out) + row * p.row_size);
  let_successors_start();
  wait_for_predecessors();

  const int64_t num_vectors = p.row_size / V::kElements;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kNumThreads;
  for (int64_t i = blockIdx.y * kNumThreads + threadIdx.x; i < num_vectors; i += step) {
    const V values = x[i];  // in one load, which a reference to it would not be
    out[i] = map_vector(values, [](float value) { return Function::of(value); });
  }
}

}  // namespace llamatelemetry
