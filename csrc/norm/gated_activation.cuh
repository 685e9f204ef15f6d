// out[r, i] = activation(x[r, i]) * x[r, row_size + i], the activation rounded to T before the
// product, as act_fn(gate) * up rounds it. Bandwidth bound: a thread has one vector.
// Grid [num_rows, blocks a row], block kNumThreads.
#pragma once

#include "norm/params.h"
#include "tile/activation.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry {

template <typename Function, typename V, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    gated_activation_kernel(const __grid_constant__ GatedActivationParams p) {
  using T = typename V::Element;
  const int64_t row = blockIdx.x;
  const V* gate = reinterpret_cast<const V*>(static_cast<const T*>(p.x) + row * p.x_row_stride);
  V* out = reinterpret_cast<V*>(static_cast<T*>(p.out) + row * p.row_size);
  const int64_t num_vectors = p.row_size / V::kElements;
  const V* up = gate + num_vectors;
  let_successors_start();
  wait_for_predecessors();

  const int64_t step = static_cast<int64_t>(gridDim.y) * kNumThreads;
  for (int64_t i = blockIdx.y * kNumThreads + threadIdx.x; i < num_vectors; i += step) {
    const V values = gate[i], factor = up[i];  // in one load each, which references would not be
    const V activated = map_vector(values, [](float g) { return Function::of(g); });
    out[i] = map_vector(activated, factor, [](float a, float u) { return a * u; });
  }
}

}  // namespace llamatelemetry
