// out[t, :] = (x[t, :] - mean) / sqrt(variance + eps) * weight + bias       (Ba et al. 2016)
// The variance is the mean of squared distances from the mean, in a second pass: no cancellation,
// whatever the mean. Bandwidth bound: one block per token, later passes hit L1/L2.
// Grid [num_tokens], block kNumThreads.
#pragma once

#include <cstdint>

#include "norm/params.h"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

template <typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    layer_norm_kernel(const __grid_constant__ LayerNormParams p) {
  const int64_t token = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out) + token * p.hidden_size;
  const auto size = static_cast<float>(p.hidden_size);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < p.hidden_size; i += kNumThreads) sum += to_float(x[i]);
  const float mean = block_sum<kNumThreads>(sum) / size;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < p.hidden_size; i += kNumThreads) {
    const float distance = to_float(x[i]) - mean;
    squares += distance * distance;
  }
  const float rstd = rsqrtf(block_sum<kNumThreads>(squares) / size + p.eps);
  for (int64_t i = threadIdx.x; i < p.hidden_size; i += kNumThreads) {
    float value = (to_float(x[i]) - mean) * rstd;
    if (weight) value *= to_float(weight[i]);
    if (bias) value += to_float(bias[i]);
    out[i] = from_float<T>(value);
  }
}

}  // namespace llamatelemetry
