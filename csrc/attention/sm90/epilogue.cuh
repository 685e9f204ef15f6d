// What leaves the Hopper kernel: the rows of out and their lse.
#pragma once

#include <cstdint>

#include "attention/sm90/softmax.cuh"
#include "attention/sm90/storage.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"

namespace llamatelemetry {

// The lse of a thread's two rows to device memory. scale: by what their results are to be scaled.
// warp: which of the computing ones, the same in every lane and known to be so.
template <typename Tile>
__device__ inline void store_lse(const Sm90Args& a, const TileWork<Tile>& work, int warp,
                                 const TwoRows& rows, float (&scale)[2]) {
  const AttentionParams& p = a.p.call;
  const int lane = threadIdx.x % 32;
  const int first_row = work.first_row + warp * kWarpRows;
  const int rows_left = first_row < 0 ? 0 : work.num_queries - first_row;
  const int64_t row_of_lse =
      work.part * p.num_heads_q * p.total_q +
      (p.cu_seqlens_q != nullptr ? work.head * p.total_q + work.first_query
                                 : (work.sequence * p.num_heads_q + work.head) * p.seqlen_q);
  const float sink = work.sink;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = quad_reduce<Sum>(rows.sum[h]);
    float row_max = rows.row_max[h];
    float weight = 1.0f;
    if (sink != -INFINITY) {
      const float largest = fmaxf(row_max, sink);
      weight = ptx::exp2_approx(row_max - largest);
      sum = sum * weight + ptx::exp2_approx(sink - largest);
      row_max = largest;
    }
    // 0 where no key was seen; else about 1 or more, as the weight of what the row_max was taken
    // from is in it.
    scale[h] = sum == 0.0f ? 0.0f : weight * ptx::reciprocal_approx(sum);
    const float lse = sum == 0.0f ? -INFINITY : (row_max + ptx::log2_approx(sum)) * kLn2;
    const int row = lane / 4 + 8 * h;
    if (row < rows_left && lane % 4 == 0) a.lse[row_of_lse + first_row + row] = lse;
  }
}

// A warp's 16 rows of results of a part of the keys, scaled, in float: rounded only when parts are
// added.
template <typename Tile>
__device__ inline void store_part(const Sm90Args& a, const TileWork<Tile>& work, int warp,
                                  const float (&r_o)[Tile::kHeadDim / 2], const float (&scale)[2]) {
  const AttentionParams& p = a.p.call;
  const int lane = threadIdx.x % 32;
  const int first_row = work.first_row + warp * kWarpRows;
  const int rows_left = first_row < 0 ? 0 : work.num_queries - first_row;
  const int64_t first_token =
      work.part * p.total_q +
      (p.cu_seqlens_q != nullptr ? work.first_query : work.sequence * p.seqlen_q) + first_row;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    if (row >= rows_left) continue;
    float* const out =
        p.partial_out + ((first_token + row) * p.num_heads_q + work.head) * p.head_dim;
#pragma unroll
    for (int j = 0; j < Tile::kHeadDim / 8; ++j) {
      const int column = 8 * j + lane % 4 * 2;
      if (column < p.head_dim) {
        *reinterpret_cast<float2*>(out + column) = {r_o[4 * j + 2 * h] * scale[h],
                                                    r_o[4 * j + 2 * h + 1] * scale[h]};
      }
    }
  }
}

// A warp's 16 rows of results, scaled, to device memory by way of buffer, where rows of 64 results
// stand as in the parts of q. The copy engine stores them unless rows are missing: past those of a
// packed sequence lie another's.
template <typename T, typename Tile>
__device__ inline void store_rows(const Sm90Args& a, const TileWork<Tile>& work, int warp,
                                  uint8_t* buffer, const float (&r_o)[Tile::kHeadDim / 2],
                                  const float (&scale)[2]) {
  constexpr int kChunks = kColumnBlock / 8;  // of 16 bytes
  constexpr int kPartBytes = Tile::kBlockM * kColumnBlockBytes;
  const AttentionParams& p = a.p.call;
  const int lane = threadIdx.x % 32;
  const int first_row = work.first_row + warp * kWarpRows;
  const int rows_left = first_row < 0 ? 0 : work.num_queries - first_row;
  const int row = lane % kWarpRows;
  const int half = lane / kWarpRows;
  uint8_t* const rows = buffer + warp * kWarpRows * kColumnBlockBytes;
#pragma unroll
  for (int first = 0; first < Tile::kColumnBlocks; first += Tile::kStoreBlocks) {
    if constexpr (!Tile::kStoresInQueries) {
      if (lane == 0) ptx::bulk_wait_read<0>();
      __syncwarp();
    }
#pragma unroll
    for (int j = first * kChunks; j < (first + Tile::kStoreBlocks) * kChunks; j += 2) {
      if (j >= Tile::kHeadDim / 8) break;
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * j + 2 * i;
        words[i] = pack_two(r_o[at] * scale[i % 2], r_o[at + 1] * scale[i % 2], T{});
      }
      ptx::stmatrix_x4(ptx::shared_address(rows + (j / kChunks - first) * kPartBytes) +
                           row * kColumnBlockBytes + ((j % kChunks + half) ^ row % 8) * 16,
                       words);
    }
    ptx::fence_proxy_async_shared();
    if (rows_left >= kWarpRows) {
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int c = 0; c < Tile::kStoreBlocks; ++c) {
          ptx::tma_store_4d(&a.out_map, ptx::shared_address(rows + c * kPartBytes),
                            (first + c) * kColumnBlock, work.first_query + first_row, work.head,
                            work.batch);
        }
        ptx::bulk_commit();
      }
    } else {
      __syncwarp();
      const int64_t token =
          (p.cu_seqlens_q != nullptr ? work.first_query : work.sequence * p.seqlen_q) + first_row +
          lane / kChunks;
      const int64_t row_stride = p.num_heads_q * p.head_dim;
      T* const out = static_cast<T*>(p.out) + token * row_stride + work.head * p.head_dim;
      constexpr int kRowsAtOnce = 32 / kChunks;
#pragma unroll 1
      for (int c = 0; c < Tile::kStoreBlocks; ++c) {
        const int column = (first + c) * kColumnBlock + lane % kChunks * 8;
#pragma unroll 1
        for (int i = 0; i < kWarpRows; i += kRowsAtOnce) {
          const int at = i + lane / kChunks;
          if (at < rows_left && column < p.head_dim) {
            *reinterpret_cast<uint4*>(out + i * row_stride + column) =
                *reinterpret_cast<const uint4*>(rows + c * kPartBytes + at * kColumnBlockBytes +
                                                (lane % kChunks ^ at % 8) * 16);
          }
        }
      }
    }
  }
}

}  // namespace llamatelemetry
