// Rows of any strides become rows along k whose length in bytes is a multiple of 16, zeros behind
// k; of e4m3 they may become float16. Bound by bandwidth; a tile of 64 x 64 goes through shared
// memory, so that reads run along what is contiguous and writes along k. Grid [batch * row tiles, k
// tiles].
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "gemm/product/params.h"

namespace llamatelemetry {

constexpr int kPackTile = 64;
constexpr int kPackThreads = 256;

__device__ inline Half widened(E4M3 x) { return Half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3)); }
template <typename T>
__device__ inline T widened(T x) {
  return x;
}

template <typename From, typename To>
__global__ void __launch_bounds__(kPackThreads)
    pack_rows_kernel(const __grid_constant__ PackRowsParams p) {
  constexpr int kPad = 4 / sizeof(To);  // a column of the tile lies in as many banks as it has rows
  __shared__ To s_tile[kPackTile][kPackTile + kPad];  // [row][k]
  const int64_t row_tiles = (p.from.rows + kPackTile - 1) / kPackTile;
  const int64_t batch = blockIdx.x / row_tiles;
  const int64_t first_row = blockIdx.x % row_tiles * kPackTile;
  const From* from = static_cast<const From*>(p.from.data) + batch * p.from.batch_stride;
  To* to = static_cast<To*>(p.to) + batch * p.from.rows * p.padded_k;
  const bool along_k = p.from.k_stride == 1;
  for (int64_t first_k = static_cast<int64_t>(blockIdx.y) * kPackTile; first_k < p.padded_k;
       first_k += static_cast<int64_t>(gridDim.y) * kPackTile) {
    __syncthreads();  // the last tile is written
#pragma unroll 4
    for (int i = threadIdx.x; i < kPackTile * kPackTile; i += kPackThreads) {
      const int outer = i / kPackTile, inner = i % kPackTile;
      const int r = along_k ? outer : inner, d = along_k ? inner : outer;
      const int64_t row = first_row + r, depth = first_k + d;
      const bool exists = row < p.from.rows && depth < p.k;
      s_tile[r][d] =
          exists ? widened(from[row * p.from.row_stride + depth * p.from.k_stride]) : To(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < kPackTile * kPackTile; i += kPackThreads) {
      const int64_t row = first_row + i / kPackTile, depth = first_k + i % kPackTile;
      if (row < p.from.rows && depth < p.padded_k) {
        to[row * p.padded_k + depth] = s_tile[i / kPackTile][i % kPackTile];
      }
    }
  }
}

}  // namespace llamatelemetry
