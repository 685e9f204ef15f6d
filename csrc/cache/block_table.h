// Where a position of a sequence lies in the paged cache. Shared by CPU and CUDA, free of torch.
#pragma once

#include <cstdint>

namespace llamatelemetry {

struct BlockTable {
  const int32_t* blocks;  // [batch, max_blocks], rows row_stride apart; a negative one is no block
  int64_t batch;
  int64_t max_blocks;
  int64_t row_stride;  // elements
  int64_t page_size;
};

// block * page_size + offset, or -1 where the sequence has no block for the position.
static inline constexpr int64_t slot_of(const BlockTable& table, int64_t row, int64_t position) {
  if (position < 0) return -1;
  const int64_t index = position / table.page_size;
  if (index >= table.max_blocks) return -1;
  const int64_t block = table.blocks[row * table.row_stride + index];
  return block < 0 ? -1 : block * table.page_size + position % table.page_size;
}

// The sequence whose tokens [cu_seqlens[b], cu_seqlens[b + 1]) hold this one, or -1. Stays within
// cu_seqlens [batch + 1] whatever that holds.
static inline constexpr int64_t sequence_of(const int32_t* cu_seqlens, int64_t batch,
                                            int64_t token) {
  if (batch == 0 || token < cu_seqlens[0] || token >= cu_seqlens[batch]) return -1;
  int64_t low = 0;
  int64_t high = batch;  // cu_seqlens[low] <= token < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (cu_seqlens[middle] <= token ? low : high) = middle;
  }
  return low;
}

}  // namespace llamatelemetry
