// out[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + eps) * weight          (Zhang & Sennrich 2019)
// Bandwidth bound: one block per token; the second read of x hits L1/L2. Accumulates in float32.
// Grid [num_tokens], block kNumThreads.
#pragma once

#include <cstdint>

#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

template <typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    rms_norm_kernel(const T* __restrict__ x,  // [num_tokens, hidden_size], rows x_row_stride apart
                    const T* __restrict__ weight,  // [hidden_size]
                    T* __restrict__ out,           // [num_tokens, hidden_size], contiguous
                    int64_t x_row_stride,          // elements
                    int hidden_size, float eps) {
  x += blockIdx.x * x_row_stride;
  out += static_cast<int64_t>(blockIdx.x) * hidden_size;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < hidden_size; i += kNumThreads) {
    const float value = to_float(x[i]);
    sum += value * value;
  }
  const float mean = block_sum<kNumThreads>(sum) / static_cast<float>(hidden_size);
  const float rstd = 1.0f / sqrtf(mean + eps);
  for (int i = threadIdx.x; i < hidden_size; i += kNumThreads) {
    const T normalised = from_float<T>(to_float(x[i]) * rstd);
    out[i] = from_float<T>(to_float(normalised) * to_float(weight[i]));
  }
}

}  // namespace llamatelemetry
