// out[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + eps) * weight          (Zhang & Sennrich 2019)
// and the same of residual[t, :] += x[t, :], where there is a residual.
// Bandwidth bound: one block per token; the second read of x hits L1/L2. Accumulates in float32.
// Grid [num_tokens], block kNumThreads.
#pragma once

#include <cstdint>

#include "norm/params.h"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

template <typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  const int64_t token = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
  T* residual = static_cast<T*>(p.residual) + token * p.residual_row_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + token * p.out_row_stride;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < p.hidden_size; i += kNumThreads) {
    float value = to_float(x[i]);
    if (p.residual) {
      residual[i] = from_float<T>(to_float(residual[i]) + value);
      value = to_float(residual[i]);
    }
    sum += value * value;
  }
  // torch multiplies by the reciprocal and takes the approximate root; so do we, to the bit.
  const float mean = block_sum<kNumThreads>(sum) * (1.0f / static_cast<float>(p.hidden_size));
  const float rstd = rsqrtf(mean + p.eps);
  const T* source = p.residual ? residual : x;
  for (int64_t i = threadIdx.x; i < p.hidden_size; i += kNumThreads) {
    const T normalised = from_float<T>(to_float(source[i]) * rstd);
    out[i] = from_float<T>(to_float(normalised) * to_float(weight[i]));
  }
}

}  // namespace llamatelemetry
