// out = x . weight^T of a byte a value for few rows of x, whose product is a read of the weight.
// mma.sync takes 16 rows of the weight as its A operand and 8 tokens as its B; sums do not depend
// on the order of k, so a lane's 16 bytes of a row are its fragments as they lie. The warps of a
// block divide k and add their sums in a fixed order. e4m3 becomes float16, a product of which
// float32 holds: no bits are lost before the sum. Bound by bandwidth. Grid: 16 columns of out a
// block.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "gemm/product/choice.h"
#include "gemm/product/epilogue.cuh"
#include "ptx/mma.cuh"
#include "ptx/mma_s8.cuh"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry {

// kTiles: of 8 tokens. kBlocks: whether scales of blocks multiply the sums over kScaleBlock of k.
template <typename T, int kTiles, bool kBlocks = false>
struct ProductFewRows {
  using Params = ProductParams;
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int, float>;
  static constexpr int kWarps = 8;
  static constexpr int kNumThreads = 32 * kWarps;
  static constexpr int kMinBlocks = 2;
  // e4m3 is float16 elsewhere by the time that it is multiplied: product_dtype.
  static constexpr int kCapability = std::is_same_v<T, E4M3> ? 90 : 80;
  static constexpr int kColumns = 16;         // rows of the weight
  static constexpr int kUnit = kScaleBlock;   // of k, that a warp takes at a time
  static constexpr int kChunks = kUnit / 64;  // of 16 bytes a lane and row
  static constexpr int kLineBytes = 128;

  // 16 bytes of k from `at` on, zeros where there is no more of it, which ends with a chunk. x is
  // what the kernel ahead may have written while this one ran: no __ldg, which is for constants.
  static __device__ uint4 load_weight(const uint8_t* row, int64_t at, int64_t k) {
    return at < k ? __ldg(reinterpret_cast<const uint4*>(row + at)) : uint4{};
  }
  static __device__ uint4 load_x(const uint8_t* row, int64_t at, int64_t k) {
    return at < k ? *reinterpret_cast<const uint4*>(row + at) : uint4{};
  }
  static __device__ uint32_t half_pair(uint32_t two) {
    const __half2_raw pair =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
    return static_cast<uint32_t>(pair.x) | static_cast<uint32_t>(pair.y) << 16;
  }

  // d += 16 rows of the weight, low and high those of a lane, times 8 tokens, over 64 of k.
  static __device__ void add(Sum (&d)[4], const uint32_t (&low)[4], const uint32_t (&high)[4],
                             const uint32_t (&x)[4]) {
    if constexpr (std::is_same_v<T, int8_t>) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {low[i], high[i], low[i + 1], high[i + 1]};
        ptx::mma_m16n8k32(d, a, x[i], x[i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t a[4] = {half_pair(low[i] & 0xffff), half_pair(high[i] & 0xffff),
                               half_pair(low[i] >> 16), half_pair(high[i] >> 16)};
        ptx::mma_m16n8k16(d, a, half_pair(x[i] & 0xffff), half_pair(x[i] >> 16), d, Half{});
      }
    }
  }

  static __device__ void run(const ProductParams& p) {
    __shared__ Sum s_sums[kWarps][8 * kTiles][kColumns];  // [warp][token][column]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, part = lane % 4;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns;
    const auto* weight = static_cast<const uint8_t*>(p.b.data);
    const auto* x = static_cast<const uint8_t*>(p.a.data);
    const auto row_of = [&](int64_t i) { return weight + min(i, p.n - 1) * p.b.row_stride; };
    let_successors_start();
    for (int64_t i = threadIdx.x; i < kColumns * (p.k / kLineBytes); i += kNumThreads) {
      ptx::prefetch_l2(row_of(column + i % kColumns) + i / kColumns * kLineBytes);
    }
    wait_for_predecessors();

    const uint8_t* low = row_of(column + group);
    const uint8_t* high = row_of(column + group + 8);
    Sum sums[kTiles][4] = {};
    const int64_t units = (p.k + kUnit - 1) / kUnit;
#pragma unroll 2
    for (int64_t unit = warp; unit < units; unit += kWarps) {
      const int64_t at = unit * kUnit + 16 * part;
      uint4 rows[2][kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        rows[0][c] = load_weight(low, at + 64 * c, p.k);
        rows[1][c] = load_weight(high, at + 64 * c, p.k);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint8_t* token =
            x + min(8 * tile + static_cast<int64_t>(group), p.m - 1) * p.a.row_stride;
        Sum of_unit[4] = {};
        Sum(&d)[4] = kBlocks ? of_unit : sums[tile];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint4 four = load_x(token, at + 64 * c, p.k);
          const uint32_t b[4] = {four.x, four.y, four.z, four.w};
          const uint32_t a_low[4] = {rows[0][c].x, rows[0][c].y, rows[0][c].z, rows[0][c].w};
          const uint32_t a_high[4] = {rows[1][c].x, rows[1][c].y, rows[1][c].z, rows[1][c].w};
          add(d, a_low, a_high, b);
        }
        if constexpr (kBlocks) {
          const float of_weight = p.column_blocks[column / kScaleBlock * units + unit];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int64_t row = min(8 * tile + 2 * static_cast<int64_t>(part) + e % 2, p.m - 1);
            sums[tile][e] += of_unit[e] * (p.row_blocks[row * units + unit] * of_weight);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s_sums[warp][8 * tile + 2 * part + e % 2][group + e / 2 * 8] = sums[tile][e];
      }
    }
    __syncthreads();
    constexpr int kStored = 4;  // columns that a thread stores
    for (int i = threadIdx.x; i < 8 * kTiles * kColumns / kStored; i += kNumThreads) {
      const int row = i / (kColumns / kStored), first = i % (kColumns / kStored) * kStored;
      Sum total[kStored] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int c = 0; c < kStored; ++c) total[c] += s_sums[w][row][first + c];
      }
      emit(p, 0, row, column + first, total);
    }
  }
};

}  // namespace llamatelemetry
