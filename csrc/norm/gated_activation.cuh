// out[r, i] = activation(x[r, i]) * x[r, row_size + i], the activation rounded to T before the
// product, as act_fn(gate) * up rounds it. Bandwidth bound.
// Grid [num_rows, blocks a row], block kNumThreads.
#pragma once

#include <cstdint>

#include "norm/params.h"
#include "tile/convert.cuh"

namespace llamatelemetry {

// The operations of torch's CUDA kernels, in their order.
struct Silu {
  static __device__ float of(float x) { return x / (1.0f + expf(-x)); }
};
struct Gelu {
  static __device__ float of(float x) { return x * 0.5f * (1.0f + erff(x * 0.70710678f)); }
};
struct GeluTanh {
  static __device__ float of(float x) {
    const float inner = 0.79788456f * (x + 0.044715f * (x * x * x));
    return 0.5f * x * (1.0f + tanhf(inner));
  }
};

template <typename Function, typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    gated_activation_kernel(const __grid_constant__ GatedActivationParams p) {
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* up = gate + p.row_size;
  T* out = static_cast<T*>(p.out) + row * p.row_size;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kNumThreads;
  for (int64_t i = blockIdx.y * kNumThreads + threadIdx.x; i < p.row_size; i += step) {
    const T activated = from_float<T>(Function::of(to_float(gate[i])));
    out[i] = from_float<T>(to_float(activated) * to_float(up[i]));
  }
}

}  // namespace llamatelemetry
