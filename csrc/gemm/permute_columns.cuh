// out[m, j] = x[m, perm[j]]: activations in the order of a weight's sorted columns (GPTQ's
// act-order). Bound by latency for few rows, else by the reads of x, which a row's cache lines
// serve. Grid [ceil(k / kNumThreads), min(m, 65535)].
#pragma once

#include <cstdint>

#include "gemm/params.h"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry {

template <typename T>
__global__ void permute_columns_kernel(const __grid_constant__ PermuteColumnsParams p) {
  let_successors_start();
  wait_for_predecessors();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= p.k) return;
  const int64_t from = p.perm[column];
  const bool exists = from >= 0 && from < p.k;
  for (int64_t row = blockIdx.y; row < p.m; row += gridDim.y) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
    static_cast<T*>(p.out)[row * p.k + column] = exists ? x[from] : T{};
  }
}

}  // namespace llamatelemetry
