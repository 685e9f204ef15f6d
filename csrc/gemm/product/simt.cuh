// out = a . b^T in float32, on ordinary cores: kRows x kColumns of out a block, 8 x 8 or 8 x 4 a
// thread. Stages of 16 of k are read into registers while the one before is multiplied. Bound by
// fused multiply-adds: 64 of them for 4 loads of 16 bytes from shared memory.
// Grid: a block a tile.
#pragma once

#include <cstdint>

#include "gemm/product/choice.h"
#include "gemm/product/epilogue.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry {

constexpr int kSimtDepth = 16;  // of k in a stage

// One operand's share of a stage, on its way to shared memory [kSimtDepth][kRows + kPad].
template <typename T, int kRows, int kThreads>
struct SimtOperand {
  static constexpr int kPad = 4;  // rows of k start in other banks, at multiples of 16 bytes
  static constexpr int kStride = kRows + kPad;
  static constexpr int kLoads = kRows * kSimtDepth / 4 / kThreads;  // of four elements, of a thread
  float loaded[kLoads][4];
  const T* next;    // this thread's first load of the next stage, where all its rows exist
  int64_t apart;    // from one of its loads to the next
  int64_t advance;  // from a stage to the next
  bool whole;       // every row of the tile exists

  __device__ void start(const Operand& x, const T* base, bool along_k, int64_t first_row) {
    const auto at = static_cast<int>(threadIdx.x);
    const int64_t row = first_row + (along_k ? at / (kSimtDepth / 4) : at % (kRows / 4) * 4);
    const int64_t depth = along_k ? at % (kSimtDepth / 4) * 4 : at / (kRows / 4);
    next = base + (along_k ? row * x.row_stride + depth : depth * x.k_stride + row);
    apart =
        along_k ? kThreads / (kSimtDepth / 4) * x.row_stride : kThreads / (kRows / 4) * x.k_stride;
    advance = along_k ? kSimtDepth : kSimtDepth * x.k_stride;
    whole = first_row + kRows <= x.rows;
  }

  // Four along k of one row, or of four rows at one depth; zeros for what does not exist.
  __device__ void load(const Operand& x, const T* base, int64_t k, bool along_k, int64_t first_row,
                       int64_t first_k) {
    if (whole && first_k + kSimtDepth <= k) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) load_four(next + i * apart, true, loaded[i]);
      next += advance;
      return;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x);
      const int64_t row = first_row + (along_k ? at / (kSimtDepth / 4) : at % (kRows / 4) * 4);
      const int64_t depth = first_k + (along_k ? at % (kSimtDepth / 4) * 4 : at / (kRows / 4));
      const int64_t left = row >= x.rows || depth >= k ? 0 : along_k ? k - depth : x.rows - row;
      const T* from = base + (along_k ? row * x.row_stride + depth : depth * x.k_stride + row);
      if (left >= 4) {
        load_four(from, true, loaded[i]);
        continue;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) loaded[i][e] = e < left ? to_float(from[e]) : 0.0f;
    }
  }
  __device__ void store(float* s, bool along_k) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = i * kThreads + static_cast<int>(threadIdx.x);
      if (along_k) {
        const int row = at / (kSimtDepth / 4), depth = at % (kSimtDepth / 4) * 4;
#pragma unroll
        for (int e = 0; e < 4; ++e) s[(depth + e) * kStride + row] = loaded[i][e];
      } else {
        const int row = at % (kRows / 4) * 4, depth = at / (kRows / 4);
        *reinterpret_cast<float4*>(s + depth * kStride + row) =
            float4{loaded[i][0], loaded[i][1], loaded[i][2], loaded[i][3]};
      }
    }
  }
};

// kGroups of four neighbours, kApart apart, of one depth.
template <int kGroups, int kApart>
__device__ inline void load_groups(const float* s, float (&values)[4 * kGroups]) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float4 four = *reinterpret_cast<const float4*>(s + g * kApart);
    values[4 * g] = four.x, values[4 * g + 1] = four.y;
    values[4 * g + 2] = four.z, values[4 * g + 3] = four.w;
  }
}

template <typename T, int kRows, int kColumns, int kColumnGroups>
struct ProductSimt {
  using Params = ProductParams;
  static constexpr int kTileRows = kRows, kTileColumns = kColumns;
  static constexpr int kRowGroups = 2;
  static constexpr int kThreadsAcross = kColumns / (4 * kColumnGroups);
  static constexpr int kNumThreads = kRows / (4 * kRowGroups) * kThreadsAcross;
  static constexpr int kMinBlocks = 512 / kNumThreads;
  static constexpr int kCapability = 75;
  using A = SimtOperand<T, kRows, kNumThreads>;
  using B = SimtOperand<T, kColumns, kNumThreads>;
  struct Stage {
    float a[kSimtDepth * A::kStride];
    float b[kSimtDepth * B::kStride];
  };

  static __device__ void run(const ProductParams& p) {
    __shared__ __align__(16) Stage s_stages[2];
    const TilePlace place =
        tile_place(blockIdx.x, (p.m + kRows - 1) / kRows, (p.n + kColumns - 1) / kColumns);
    const int64_t first_row = place.row * kRows, first_column = place.column * kColumns;
    const T* a = static_cast<const T*>(p.a.data) + place.batch * p.a.batch_stride;
    const T* b = static_cast<const T*>(p.b.data) + place.batch * p.b.batch_stride;
    const bool a_along_k = p.k <= 1 || p.a.k_stride == 1;
    const bool b_along_k = p.k <= 1 || p.b.k_stride == 1;
    const int row = threadIdx.x / kThreadsAcross * 4, column = threadIdx.x % kThreadsAcross * 4;
    constexpr int kRowsApart = kRows / kRowGroups, kColumnsApart = kColumns / kColumnGroups;
    float sums[4 * kRowGroups][4 * kColumnGroups] = {};
    A a_part;
    B b_part;
    a_part.start(p.a, a, a_along_k, first_row);
    b_part.start(p.b, b, b_along_k, first_column);
    const auto load = [&](int64_t first_k) {
      a_part.load(p.a, a, p.k, a_along_k, first_row, first_k);
      b_part.load(p.b, b, p.k, b_along_k, first_column, first_k);
    };
    const int64_t steps = (p.k + kSimtDepth - 1) / kSimtDepth;
    if (steps > 0) load(0);
    for (int64_t step = 0; step < steps; ++step) {
      Stage& stage = s_stages[step % 2];
      a_part.store(stage.a, a_along_k);
      b_part.store(stage.b, b_along_k);
      __syncthreads();  // with two stages, nobody still reads the one that is written next
      if (step + 1 < steps) load((step + 1) * kSimtDepth);
#pragma unroll
      for (int depth = 0; depth < kSimtDepth; ++depth) {
        float x[4 * kRowGroups], y[4 * kColumnGroups];
        load_groups<kRowGroups, kRowsApart>(stage.a + depth * A::kStride + row, x);
        load_groups<kColumnGroups, kColumnsApart>(stage.b + depth * B::kStride + column, y);
#pragma unroll
        for (int i = 0; i < 4 * kRowGroups; ++i) {
#pragma unroll
          for (int j = 0; j < 4 * kColumnGroups; ++j) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kRowGroups; ++i) {
#pragma unroll
      for (int g = 0; g < kColumnGroups; ++g) {
        const float four[4] = {sums[i][4 * g], sums[i][4 * g + 1], sums[i][4 * g + 2],
                               sums[i][4 * g + 3]};
        emit(p, place.batch, first_row + i / 4 * kRowsApart + row + i % 4,
             first_column + g * kColumnsApart + column, four);
      }
    }
  }
};

}  // namespace llamatelemetry
