// What leaves a kernel on mma.sync: the rows of out and their lse.
#pragma once

#include <cstdint>

#include "attention/mma/softmax.cuh"
#include "tile/swizzled_tile.cuh"

namespace llamatelemetry {

// Divides by the sums and writes out and lse of the warp's rows from first_row. stage: where the
// warp may keep its 16 * kRowTiles rows in shared memory.
template <typename T, typename Tile, int kRowTiles, int kDimTiles>
__device__ inline void write_rows(const AttentionParams& p, const MmaWork& work,
                                  const float (&o)[kRowTiles][kDimTiles][4],
                                  const OnlineSoftmax<kRowTiles>& softmax, int first_row,
                                  char* stage) {
  const int lane = threadIdx.x % kWarpSize;
  const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[work.head] * kLog2E;
  // Of the four lanes that share 2 * kRowTiles rows, each writes the lse of one.
  float own_sum = 0;
  float own_row_max = 0;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A sink is a score without a value. Without a key the sum is the sink's, or 0.
      float sum = quad_reduce<Sum>(softmax.sum[r][half]);
      const float row_max = fmaxf(softmax.row_max[r][half], sink);
      float scale = ptx::exp2_approx(softmax.row_max[r][half] - row_max);
      sum = sum * scale + (sink == -INFINITY ? 0.0f : ptx::exp2_approx(sink - row_max));
      scale = sum == 0.0f ? 0.0f : __fdividef(scale, sum);
      if (lane % 4 == 2 * r + half) {
        own_sum = sum;
        own_row_max = row_max;
      }
      const uint32_t row = Tile::offset(16 * r + lane / 4 + 8 * half, 0) + lane % 4 * 4;
#pragma unroll
      for (int t = 0; t < kDimTiles; ++t) {
        // Chunk t from chunk 0: within a span by exchange, from span to span by distance.
        const uint32_t to = (row ^ (t % Tile::kSpan * Tile::kChunkBytes)) +
                            t / Tile::kSpan * Tile::kSpan * Tile::kChunkBytes;
        *reinterpret_cast<uint32_t*>(stage + to) =
            pack_two(o[r][t][2 * half] * scale, o[r][t][2 * half + 1] * scale, T{});
      }
    }
  }
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t first_token = packed ? p.cu_seqlens_q[work.index] : work.index * p.seqlen_q;
  const int own_row = first_row + lane / 4 + lane % 4 * 8;
  if (lane % 4 < 2 * kRowTiles && own_row < work.num_queries) {
    float* lse = packed ? p.lse + work.head * p.total_q + first_token
                        : p.lse + (work.index * p.num_heads_q + work.head) * p.seqlen_q;
    lse[own_row] = own_sum == 0.0f ? -INFINITY : (own_row_max + __log2f(own_sum)) * kLn2;
  }
  __syncwarp();

  constexpr int kRowStep = kWarpSize / Tile::kSpan;
  int row = lane / Tile::kSpan;
  const int chunk = lane % Tile::kSpan;
  const int64_t row_elements = p.num_heads_q * p.head_dim;
  T* out = static_cast<T*>(p.out) + (first_token + first_row + row) * row_elements +
           work.head * p.head_dim + chunk * Tile::kChunkElements;
#pragma unroll
  for (int step = 0; step < 16 * kRowTiles; step += kRowStep) {
    if (first_row + row < work.num_queries) {
#pragma unroll
      for (int span = 0; span < Tile::kChunks; span += Tile::kSpan) {
        if ((chunk + span) * Tile::kChunkElements < p.head_dim) {
          *reinterpret_cast<uint4*>(out + span * Tile::kChunkElements) =
              *reinterpret_cast<const uint4*>(stage + Tile::offset(row, chunk + span));
        }
      }
    }
    row += kRowStep;
    out += kRowStep * row_elements;
  }
}

}  // namespace llamatelemetry
