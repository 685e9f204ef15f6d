// How rows of q, k and v are found and shared out to the threads that load them.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace llamatelemetry {

// Rows of one head of one sequence.
template <typename T>
struct HeadRows {
  const T* first;
  int64_t stride;

  __device__ HeadRows(const Heads& x, int64_t index, int64_t first_token, int64_t head)
      : first(static_cast<const T*>(x.data) + index * x.batch_stride +
              first_token * x.token_stride + head * x.head_stride),
        stride(x.token_stride) {}
};

// The same where keys lie in pages.
template <typename T>
struct PagedRows {
  const T* head;  // of block 0
  const int32_t* table;
  int64_t block_stride;
  int64_t slot_stride;
  int page_size;

  __device__ PagedRows(const AttentionParams& p, const Heads& x, int64_t index, int64_t kv_head)
      : head(static_cast<const T*>(x.data) + kv_head * x.head_stride),
        table(p.block_table + index * p.block_table_stride),
        block_stride(x.batch_stride),
        slot_stride(x.token_stride),
        page_size(static_cast<int>(p.k.page_size)) {}

  __device__ const T* row(int key) const {
    return head + table[key / page_size] * block_stride + key % page_size * slot_stride;
  }
};

// A thread's share of tiles of kRows rows: chunks in the same column of every kRowStep-th row.
template <typename Tile, int kRows, int kNumThreads>
struct TileShare {
  static constexpr int kRowStep = kNumThreads / Tile::kSpan;
  static constexpr int kSteps = kRows / kRowStep;
  static_assert(kRows % kRowStep == 0 && kRowStep % 8 == 0);
  int row;
  int chunk;

  __device__ TileShare() : row(threadIdx.x / Tile::kSpan), chunk(threadIdx.x % Tile::kSpan) {}

  static constexpr int kCount = kSteps * Tile::kChunks / Tile::kSpan;

  // Calls each(number of the chunk in this share, its offset in the tile, its row, its column).
  template <int kUnroll = kCount, typename Each>
  __device__ void for_each(Each each) const {
    const uint32_t offset = Tile::offset(row, chunk);
#pragma unroll kUnroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll kUnroll
      for (int span = 0; span < Tile::kChunks; span += Tile::kSpan) {
        each((step * Tile::kChunks + span) / Tile::kSpan,
             offset + step * kRowStep * Tile::kRowBytes + span * Tile::kChunkBytes,
             row + step * kRowStep, chunk + span);
      }
    }
  }
};

// Eight elements of a row, wherever it starts.
template <typename T>
__device__ inline uint4 load_unaligned(const T* p) {
  const auto* halves = reinterpret_cast<const uint16_t*>(p);
  const auto two = [&](int i) {
    return halves[2 * i] | static_cast<uint32_t>(halves[2 * i + 1]) << 16;
  };
  return {two(0), two(1), two(2), two(3)};
}

}  // namespace llamatelemetry
