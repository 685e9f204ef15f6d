// out[r, :] = exp(y - max(y)) / sum(exp(y - max(y))) with y = x[r, :] / temperature, in float.
// One block per row; later passes hit L1/L2. A NaN, an inf or nothing but -inf gives NaN in the
// whole row and in no other. Grid [num_rows], block kNumThreads.
#pragma once

#include <cstdint>

#include "norm/params.h"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

template <typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    softmax_kernel(const __grid_constant__ SoftmaxParams p) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  T* out = static_cast<T*>(p.out) + row * p.row_size;
  float max = Max::kStart;
  for (int64_t i = threadIdx.x; i < p.row_size; i += kNumThreads) max = fmaxf(max, to_float(x[i]));
  max = block_max<kNumThreads>(max) / p.temperature;  // monotonic: the largest quotient too
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < p.row_size; i += kNumThreads) {
    sum += expf(to_float(x[i]) / p.temperature - max);
  }
  sum = block_sum<kNumThreads>(sum);
  for (int64_t i = threadIdx.x; i < p.row_size; i += kNumThreads) {
    out[i] = from_float<T>(expf(to_float(x[i]) / p.temperature - max) / sum);
  }
}

}  // namespace llamatelemetry
