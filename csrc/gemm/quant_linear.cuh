// out[m, :] = x[m, :] · Wᵀ + bias, W [n, k] packed (format/layout.h). Each weight is decoded
// once for up to kMaxRows rows of x, in registers, to the float32 that dequantize gives; products
// and sums are float32, whatever the dtype of x.
// Bound by reading W for few rows, by arithmetic for many. A block makes the 16 columns of one tile
// for kMaxRows rows; four neighbouring threads hold the 16 rows of a word, so a warp reads 512
// consecutive bytes. k is split over the threads and summed in a fixed order.
// Grid [ceil(m / kMaxRows) * ceil(n / 16)], block kNumThreads.
#pragma once

#include <cstdint>

#include "format/decode.cuh"
#include "gemm/choice.h"
#include "gemm/params.h"
#include "tile/reduce.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry {

// Elements first .. first + 3 of x. One branch on the dtype serves 16 multiply-adds or more.
__device__ inline void load_x(const QuantLinearParams& p, int64_t first, bool aligned,
                              float (&values)[4]) {
  switch (p.dtype) {
    case DType::kFloat32: return load_four(static_cast<const float*>(p.x) + first, aligned, values);
    case DType::kFloat16: return load_four(static_cast<const Half*>(p.x) + first, aligned, values);
    case DType::kBFloat16:
      return load_four(static_cast<const BFloat16*>(p.x) + first, aligned, values);
    default: break;  // check_floating refuses the others
  }
}

template <typename T>
__device__ inline void store_with_bias(const QuantLinearParams& p, int64_t row, int64_t column,
                                       float value) {
  if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[column]);
  static_cast<T*>(p.out)[row * p.n + column] = from_float<T>(value);
}

template <int kFormat, int kMaxRows, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    quant_linear_kernel(const QuantLinearParams p, bool x_aligned) {
  constexpr int kQuad = 4;  // rows of W in a thread
  constexpr int kNumWarps = kNumThreads / kWarpSize;
  using Word = PackedWord<kFormat, kQuad>;
  const int quad = threadIdx.x % kQuad;
  const auto num_tiles = static_cast<unsigned>((p.n + kTileRows - 1) / kTileRows);
  const int64_t tile = blockIdx.x % num_tiles;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / num_tiles) * kMaxRows;
  const int num_rows = static_cast<int>(min(static_cast<int64_t>(kMaxRows), p.m - first_row));
  const int blocks_per_row = static_cast<int>(p.k / Word::kBlockSize);
  const uint8_t* packed = p.packed + tile * blocks_per_row * Word::kPackedBytes;

  float sum[kMaxRows][kQuad] = {};
  for (int i = threadIdx.x / kQuad; i < blocks_per_row * Word::kWordsPerBlock;
       i += kNumThreads / kQuad) {
    const int block = i / Word::kWordsPerBlock;
    const int word = i % Word::kWordsPerBlock;
    TileScales side{};
    if constexpr (Word::kHasGroups) side = scales_of(p.groups, tile, block);
    const Word weights_of(packed + static_cast<int64_t>(block) * Word::kPackedBytes, word,
                          kQuad * quad, side);
#pragma unroll
    for (int part = 0; part < Word::kParts; ++part) {
      if (part >= Word::num_parts(word)) break;
      float weights[kQuad][4];
#pragma unroll
      for (int r = 0; r < kQuad; ++r) weights_of.decode(part, r, weights[r]);
      const int k = block * Word::kBlockSize + Word::first_weight(word, part);
#pragma unroll
      for (int m = 0; m < kMaxRows; ++m) {
        if (m >= num_rows) continue;
        float x[4];
        load_x(p, (first_row + m) * p.x_row_stride + k, x_aligned, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int r = 0; r < kQuad; ++r) sum[m][r] = fmaf(weights[r][j], x[j], sum[m][r]);
        }
      }
    }
  }

  // Threads of a warp with the same quad, then the warps in order.
  __shared__ float s_partial[kNumWarps][kMaxRows][kTileRows];
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < kMaxRows; ++m) {
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
#pragma unroll
      for (int offset = kWarpSize / 2; offset >= kQuad; offset /= 2) {
        sum[m][r] += __shfl_xor_sync(0xffffffff, sum[m][r], offset);
      }
      if (lane < kQuad) s_partial[threadIdx.x / kWarpSize][m][kQuad * lane + r] = sum[m][r];
    }
  }
  __syncthreads();
  const int m = threadIdx.x / kTileRows;
  const int64_t column = tile * kTileRows + threadIdx.x % kTileRows;
  if (m >= num_rows || column >= p.n) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kNumWarps; ++warp) {
    total += s_partial[warp][m][threadIdx.x % kTileRows];
  }
  switch (p.dtype) {
    case DType::kFloat32: return store_with_bias<float>(p, first_row + m, column, total);
    case DType::kFloat16: return store_with_bias<Half>(p, first_row + m, column, total);
    case DType::kBFloat16: return store_with_bias<BFloat16>(p, first_row + m, column, total);
    default: break;
  }
}

template <int kFormat, int kRows>
void launch_quant_linear_rows(const QuantLinearParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  const int64_t four = p.dtype == DType::kFloat32 ? 16 : 8;  // bytes of four elements
  const bool x_aligned = reinterpret_cast<uintptr_t>(p.x) % four == 0 && p.x_row_stride % 4 == 0;
  const int64_t num_tiles = (p.n + kTileRows - 1) / kTileRows;
  const auto grid = static_cast<unsigned>(num_tiles * ((p.m + kRows - 1) / kRows));
  quant_linear_kernel<kFormat, kRows, kNumThreads><<<grid, kNumThreads, 0, stream>>>(p, x_aligned);
}

// Launches for the formats of a set.
template <FormatSet kSet>
Error launch_quant_linear_of(const QuantLinearParams& p, Stream stream) {
  dispatch_format<kSet>(p.format, [&](auto format) {
    if (p.m == 1) {
      launch_quant_linear_rows<format(), 1>(p, stream);
    } else {
      launch_quant_linear_rows<format(), kMaxFusedRows>(p, stream);
    }
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
