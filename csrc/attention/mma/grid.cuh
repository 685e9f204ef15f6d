// The grid of the kernels on mma.sync: what a launch hands to its blocks, which rows a block works
// on, and the launch itself.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "attention/schedule.cuh"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {

struct MmaGrid {
  AttentionParams attn;
  TileSchedule<unsigned> schedule;
  unsigned group_size;  // query heads that share a key head
  uint32_t k_step;      // bytes between the rows of a tile that one thread loads
  uint32_t v_step;
  float scale_log2;  // softmax_scale * log2(e), or 1 where apply_score_rule has applied it
  bool needs_score_rule;
  bool aligned;  // whether rows of q, k and v can be moved by 16 bytes
};

// Grid [batch * num_heads_q * num_row_blocks], in the order of schedule.cuh.
struct MmaWork {
  int index;  // of the sequence
  int head;
  int kv_head;
  int first_row;
  int num_queries;
  // Dense keys in front of the first that any query sees are none of the sequence's here: nobody
  // counts, reads or multiplies them. In pages they keep their places.
  int64_t first_key;  // dense: in k and v
  int num_keys;
  int begin_key;  // the first that any query sees
  int end_key;    // keys from here on are in no page

  __device__ MmaWork(const MmaGrid& grid, int block_rows) {
    const AttentionParams& p = grid.attn;
    const TilePlace place =
        place_of_tile<unsigned>(grid.schedule, blockIdx.x, static_cast<unsigned>(p.num_heads_q));
    index = place.sequence;
    head = place.head;
    kv_head = static_cast<int>(static_cast<unsigned>(head) / grid.group_size);
    first_row = place.row_block * block_rows;
    const SequenceSpan sequence = sequence_span(p, index);
    num_queries = static_cast<int>(sequence.num_queries);
    const int64_t hidden =
        window_keys(p.window_left, p.window_right, sequence.num_keys, sequence.num_queries, 0)
            .begin;
    const bool paged = p.k.page_size > 0;
    first_key = sequence.first_key + hidden;
    num_keys = static_cast<int>(paged ? sequence.num_keys : sequence.num_keys - hidden);
    begin_key = paged ? static_cast<int>(hidden) : 0;
    end_key = paged ? static_cast<int>(min(sequence.num_keys, p.seqlen_k)) : num_keys;
  }

  // The keys that a row of the sequence sees.
  __device__ KeyRange keys_of_row(const AttentionParams& p, int row) const {
    KeyRange keys = window_keys(p.window_left, p.window_right, num_keys, num_queries, row);
    keys.end = min(keys.end, static_cast<int64_t>(end_key));
    keys.begin = min(keys.begin, keys.end);
    return keys;
  }
};

// ---- On the host ----

constexpr int64_t kMaxTokenStride = 1 << 22;

// Whether load_tile can take whole chunks: within a tile offsets are 32 bits.
inline bool has_whole_chunks(const Heads& x, int64_t batch, int64_t tokens, int64_t heads) {
  return rows_are_aligned(x, batch, tokens, heads, 2) && x.token_stride < kMaxTokenStride;
}

// l2_bytes: what keys and values of the heads that are worked on together may take.
inline MmaGrid mma_grid(const AttentionParams& p, int block_rows, int row_step, int64_t l2_bytes) {
  const bool needs_rule = needs_score_rule(p);
  const int64_t heads = p.batch * p.num_heads_q;
  const int64_t row_blocks = (p.seqlen_q + block_rows - 1) / block_rows;
  const int64_t num_parts = p.k.page_size > 0 ? INT64_MAX : p.batch;  // of k and v
  const int64_t key_bytes = 4 * p.head_dim * p.seqlen_k * p.num_heads_kv / p.num_heads_q;
  int64_t group_heads = key_bytes > 0 ? l2_bytes / key_bytes : heads;
  if (group_heads < 1) group_heads = 1;
  if (group_heads > heads) group_heads = heads;
  return {.attn = p,
          .schedule = {.num_tiles = static_cast<unsigned>(heads * row_blocks),
                       .num_row_blocks = static_cast<unsigned>(row_blocks),
                       .num_heads = static_cast<unsigned>(heads),
                       .group_heads = static_cast<unsigned>(group_heads),
                       .ascends = false},
          .group_size = static_cast<unsigned>(p.group_size),
          .k_step = static_cast<uint32_t>(p.k.rows.token_stride * row_step * 2),
          .v_step = static_cast<uint32_t>(p.v.rows.token_stride * row_step * 2),
          .scale_log2 = needs_rule ? 1.0f : p.softmax_scale * kLog2E,
          .needs_score_rule = needs_rule,
          .aligned = has_whole_chunks(p.q, p.batch, p.total_q, p.num_heads_q) &&
                     has_whole_chunks(p.k.rows, num_parts, p.total_k, p.num_heads_kv) &&
                     has_whole_chunks(p.v.rows, num_parts, p.total_k, p.num_heads_kv)};
}

template <typename Kernel>
Error launch_mma_kernel(const AttentionParams& p, int64_t l2_bytes, Stream stream) {
  const MmaGrid grid = mma_grid(p, Kernel::kRows, Kernel::kRowStep, l2_bytes);
  cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       Kernel::kSharedBytes);
  kernel_entry<Kernel>
      <<<grid.schedule.num_tiles, Kernel::kNumThreads, Kernel::kSharedBytes, stream>>>(grid);
  return last_launch_error();
}

}  // namespace llamatelemetry
