// What leaves the Hopper kernel: the rows of out and their lse.
#pragma once

#include <cstdint>

#include "attention/flash_sm90_softmax.cuh"
#include "attention/flash_sm90_tile.cuh"

namespace llamatelemetry {

template <typename T>
__device__ inline FlashWarpRows warp_rows_of(const FlashAttnParams& p, const FlashTileWork& work,
                                             int row) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t token = (packed ? work.sequence.first_query : work.place.index * p.seqlen_q) + row;
  const int64_t sequence_head = work.place.index * p.num_heads_q + work.place.head;
  return {.out = static_cast<T*>(p.out) + (token * p.num_heads_q + work.place.head) * p.head_dim,
          .lse = p.lse +
                 (packed ? work.place.head * p.total_q + token : sequence_head * p.seqlen_q + row),
          .rows_left = work.num_queries - row,
          .sink = p.sinks == nullptr ? -INFINITY : p.sinks[work.place.head] * kLog2E};
}

// Two rows of results to device memory. The four lanes of a quad trade words so that each holds
// eight consecutive columns: whole sectors leave at once.
template <typename T, typename Tile>
__device__ inline void store_rows(const FlashWarpRows& to, int64_t row_stride, int head_dim,
                                  float scale_log2, const float (&r_o)[Tile::kHeadDim / 2],
                                  const TwoRows& rows) {
  const int lane = threadIdx.x % 4;
  const int first = threadIdx.x % 32 / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = quad_sum(rows.sum[h]);
    float reference = rows.largest[h] * scale_log2;
    float weight = 1.0f;
    if (to.sink != -INFINITY) {
      const float largest = fmaxf(reference, to.sink);
      weight = ptx::exp2_approx(reference - largest);
      sum = sum * weight + ptx::exp2_approx(to.sink - largest);
      reference = largest;
    }
    const float scale = sum == 0.0f ? 0.0f : __fdividef(weight, sum);
    const int row = first + 8 * h;
    const bool exists = row < to.rows_left;
    if (exists && lane == 0) {
      to.lse[row] = sum == 0.0f ? -INFINITY : (reference + __log2f(sum)) * kLn2;
    }
    T* out = static_cast<T*>(to.out) + row * row_stride;
#pragma unroll
    for (int j = 0; j < Tile::kHeadDim / 8; j += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (j + i) + 2 * h;
        word[i] = pack_two(r_o[at] * scale, r_o[at + 1] * scale, T{});
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffff, lane & 1 ? word[i] : word[i + 1], 1);
        (lane & 1 ? word[i] : word[i + 1]) = got;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(0xffffffff, lane & 2 ? word[i] : word[i + 2], 2);
        (lane & 2 ? word[i] : word[i + 2]) = got;
      }
      const int column = 8 * (j + lane);
      if (exists && column < head_dim) {
        // Not to push keys and values out of L2.
        __stcs(reinterpret_cast<uint4*>(out + column),
               make_uint4(word[0], word[1], word[2], word[3]));
      }
    }
  }
}

}  // namespace llamatelemetry
