// out = x . W^T and what follows, for up to 16 rows of x in two bytes, W [n, k] as torch has it:
// bound by reading W once.
//
// W is the A operand of mma.m16n8k16, rows of x are the columns of B. A sum does not care about the
// order of its terms, so a lane's 16 bytes of a row, eight consecutive values, are its share of two
// fragments, of W and of x alike: nothing passes through shared memory before the sums do. The
// warps of a block take chunks of k in turn, each with the loads of its next chunk under way while
// it multiplies one. Gated: rows 0 to 7 of a fragment are gates, rows 8 to 15 what they multiply.
// Grid [ceil(n / 16)], block kWarps warps.
#pragma once

#include <cstdint>

#include "gemm/linear_epilogue.cuh"
#include "gemm/params.h"
#include "ptx/dependent_launch.cuh"
#include "ptx/global.cuh"
#include "ptx/mma.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

struct LinearSkinnyConfig {
  int token_tiles;  // of 8 rows of x
  int warps;        // of a block
  int steps;        // of a chunk, 32 of k each: half a line of 128 bytes of a row
  int min_blocks;   // on a multiprocessor
};

template <typename T, LinearSkinnyConfig kConfig>
struct LinearSkinny {
  using Params = LinearParams;
  static constexpr int kCapability = 80;
  static constexpr int kTokenTiles = kConfig.token_tiles;
  static constexpr int kNumWarps = kConfig.warps;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = kConfig.min_blocks;
  static constexpr int kVector = 8;          // values of a lane's load
  static constexpr int kStep = 4 * kVector;  // of k: the loads of four lanes
  static constexpr int kSteps = kConfig.steps;
  static constexpr int kChunk = kSteps * kStep;
  static constexpr int kRows = 16;
  static constexpr int kTokens = 8 * kTokenTiles;

  struct Chunk {
    uint4 w[kSteps][2];  // of rows group and group + 8
    uint4 x[kSteps][kTokenTiles];
  };

  const Params& p;
  const int warp, group, lane_in_group;
  const int num_chunks;
  const int64_t first_row;  // of out's columns that this block makes
  const T* w_rows[2];
  const T* x_rows[kTokenTiles];
  float sums[kTokenTiles][4] = {};

  static __device__ void run(const Params& p) {
    __shared__ float s_sums[kNumWarps][kRows][kTokens + 1];
    LinearSkinny work(p);
    work.prefetch_weights();
    wait_for_predecessors();
    work.multiply();
    // Not earlier: a whole step took longer, most of all with attention in clusters of blocks
    // (benchmarks/notes/attention.md).
    let_successors_start();
    work.reduce_and_store(s_sums);
  }

  __device__ explicit LinearSkinny(const Params& p)
      : p(p),
        warp(threadIdx.x / kWarpSize),
        group(threadIdx.x % kWarpSize / 4),
        lane_in_group(threadIdx.x % 4),
        num_chunks(static_cast<int>((p.k + kChunk - 1) / kChunk)),
        first_row(int64_t{blockIdx.x} * (p.epilogue.gated ? kRows / 2 : kRows)) {
    const T* weight = static_cast<const T*>(p.weight) + kVector * lane_in_group;
    const T* x = static_cast<const T*>(p.x) + kVector * lane_in_group;
    for (int half = 0; half < 2; ++half) {
      w_rows[half] = weight + row_of(group + 8 * half) * p.weight_row_stride;
    }
    for (int t = 0; t < kTokenTiles; ++t) {  // rows past m: the last once more, to no effect
      x_rows[t] = x + min(int64_t{8 * t + group}, p.m - 1) * p.x_row_stride;
    }
  }

  // Of the weight, for row i of the fragment; rows past n: the last once more.
  __device__ int64_t row_of(int i) const {
    const int64_t half = p.n / 2;
    if (!p.epilogue.gated) return min(first_row + i, p.n - 1);
    return i < 8 ? min(first_row + i, half - 1) : half + min(first_row + i - 8, half - 1);
  }

  // 128 bytes of each row of each warp's first chunks.
  __device__ void prefetch_weights() const {
    const int lane = threadIdx.x % kWarpSize;
    constexpr int kLine = 64, kLines = kNumWarps * 2;  // values; of a row, in the block
    const int64_t column = int64_t{warp + lane / kRows * kNumWarps} * kLine;
    static_assert(kLines * kLine <= 2 * kNumWarps * kChunk);
    if (column >= p.k) return;
    ptx::prefetch_l2(static_cast<const T*>(p.weight) + row_of(lane % kRows) * p.weight_row_stride +
                     column);
  }

  __device__ void load(Chunk& chunk, int index) const {
    if (index >= num_chunks) return;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t column = int64_t{index} * kChunk + s * kStep;
      const bool exists = column + kVector * lane_in_group < p.k;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        chunk.w[s][half] = exists ? ptx::load_streamed(w_rows[half] + column) : uint4{};
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        chunk.x[s][t] = exists ? *reinterpret_cast<const uint4*>(x_rows[t] + column) : uint4{};
      }
    }
  }

  __device__ void add(const Chunk& chunk) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint4 &top = chunk.w[s][0], &bottom = chunk.w[s][1];
      const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
      const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const uint4& x = chunk.x[s][t];
        ptx::mma_m16n8k16(sums[t], first, x.x, x.y, sums[t], T{});
        ptx::mma_m16n8k16(sums[t], second, x.z, x.w, sums[t], T{});
      }
    }
  }

  __device__ void multiply() {
    Chunk even, odd;
    load(even, warp);
    for (int i = warp; i < num_chunks; i += 2 * kNumWarps) {
      load(odd, i + kNumWarps);
      add(even);
      load(even, i + 2 * kNumWarps);
      if (i + kNumWarps < num_chunks) add(odd);
    }
  }

  // Adds the warps' sums up, in their order.
  __device__ void reduce_and_store(float (&s_sums)[kNumWarps][kRows][kTokens + 1]) const {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s_sums[warp][group + e / 2 * 8][8 * t + 2 * lane_in_group + e % 2] = sums[t][e];
      }
    }
    __syncthreads();
    const bool gated = p.epilogue.gated;
    const int columns = gated ? kRows / 2 : kRows;
    const int64_t out_n = gated ? p.n / 2 : p.n;
    for (int i = threadIdx.x; i < columns * kTokens; i += kNumThreads) {
      const int row = i % columns, token = i / columns;
      const int64_t column = first_row + row;
      if (token >= p.m || column >= out_n) continue;
      Vector<T, 1> y{{total(s_sums, row, token, column)}};
      Vector<T, 1> up{};
      if (gated) up.value[0] = total(s_sums, row + kRows / 2, token, out_n + column);
      finish(p.epilogue, token, column, up, y);
      static_cast<T*>(p.out)[token * out_n + column] = y.value[0];
    }
  }
  __device__ T total(const float (&s_sums)[kNumWarps][kRows][kTokens + 1], int row, int token,
                     int64_t column) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kNumWarps; ++w) sum += s_sums[w][row][token];
    if (p.epilogue.bias != nullptr) {
      sum += to_float(static_cast<const T*>(p.epilogue.bias)[column]);
    }
    return from_float<T>(sum);
  }
};

}  // namespace llamatelemetry
