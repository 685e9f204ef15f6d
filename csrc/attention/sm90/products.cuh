// The products of a computing warpgroup of the Hopper kernel.
#pragma once

#include <cstdint>

#include "attention/sm90/storage.cuh"
#include "common/dtype.h"
#include "ptx/mma.cuh"
#include "ptx/wgmma.cuh"

namespace llamatelemetry {

// s = q k^T for one warpgroup's 64 rows. Ends without waiting.
template <typename T, typename Tile>
__device__ inline void multiply_keys(float (&r_s)[Tile::kBlockN / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int step = 0; step < Tile::kHeadDim / kDepth; ++step) {
    constexpr int kStepsPerColumnBlock = kColumnBlock / kDepth;
    const int block = step / kStepsPerColumnBlock;
    const int within = step % kStepsPerColumnBlock * kDepth * 2;
    ptx::wgmma_shared<T, Tile::kBlockN>(
        r_s, q + ((block * Tile::kBlockM * kColumnBlockBytes + within) >> 4),
        k + ((block * Tile::kBlockN * kColumnBlockBytes + within) >> 4), step > 0);
  }
  ptx::wgmma_commit();
}
// From weights of lost rows back to their scores, for one warp's 16 rows, by products of a warp: q
// and its keys still lie there. Where the weight is 0, masked or far below, the score is -inf now.
template <typename T, typename Tile>
__device__ inline void multiply_keys_again(float (&r_s)[Tile::kBlockN / 2], const bool (&lost)[2],
                                           uint32_t q, uint32_t k) {
  const int lane = threadIdx.x % 32;
  // Of the four matrices of 8 x 8 that a lane's address is for one row of: q's are by rows first,
  // those of keys by columns first.
  const int q_row = lane % 16;
  const int k_row = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int pair = 0; pair < Tile::kBlockN / 16; ++pair) {
    float sums[2][4] = {};
#pragma unroll 1
    for (int step = 0; step < Tile::kHeadDim / kDepth; ++step) {
      constexpr int kStepsPerColumnBlock = kColumnBlock / kDepth;
      const int block = step / kStepsPerColumnBlock;
      const int chunk = step % kStepsPerColumnBlock * 2;  // of 16 bytes
      uint32_t rows[4];
      uint32_t keys[4];
      ptx::ldmatrix_x4(rows, q + (block * Tile::kBlockM + q_row) * kColumnBlockBytes +
                                 ((chunk + lane / 16) ^ q_row % 8) * 16);
      ptx::ldmatrix_x4(keys, k + (block * Tile::kBlockN + 16 * pair + k_row) * kColumnBlockBytes +
                                 ((chunk + lane / 8 % 2) ^ k_row % 8) * 16);
      ptx::mma_m16n8k16(sums[0], rows, keys[0], keys[1], sums[0], T{});
      ptx::mma_m16n8k16(sums[1], rows, keys[2], keys[3], sums[1], T{});
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = r_s[8 * pair + i];
      const float again = score != 0.0f ? sums[i / 4][i % 4] : -INFINITY;
      score = lost[i % 4 / 2] ? again : score;
    }
  }
}
// o = p v, or o += p v where adds. Ends without waiting.
template <typename T, typename Tile>
__device__ inline void multiply_values(float (&r_o)[Tile::kHeadDim / 2],
                                       const uint32_t (&r_p)[Tile::kBlockN / kDepth][4], uint64_t v,
                                       bool adds) {
#pragma unroll
  for (int step = 0; step < Tile::kBlockN / kDepth; ++step) {
    ptx::wgmma_registers<T, Tile::kHeadDim>(
        r_o, r_p[step], v + ((step * kDepth * kColumnBlockBytes) >> 4), step > 0 || adds);
  }
  ptx::wgmma_commit();
}

}  // namespace llamatelemetry
