// What the launchers of csrc/attention/ take, and which keys a query sees. Strides in elements; the
// last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

constexpr int kMaxHeadDim = 256;
constexpr int kHeadDimMultiple = 8;

// K or V: row (block, slot, head) starts at data + block * block_stride + slot * slot_stride +
// head * head_stride.
struct PagedCache {
  const void* data;  // [num_blocks, page_size, num_heads_kv, head_dim]
  int64_t block_stride;
  int64_t slot_stride;
  int64_t head_stride;
};

struct PagedAttentionParams {
  const void* q;  // [total_q, num_heads_q, head_dim]
  PagedCache k;
  PagedCache v;
  const int32_t* block_table;    // [batch, max_blocks], rows block_table_stride apart
  const int32_t* cache_seqlens;  // [batch], keys of each sequence, its queries' own included
  const int32_t* cu_seqlens_q;   // [batch + 1]
  void* out;                     // [total_q, num_heads_q, head_dim], contiguous
  float* lse;                    // [num_heads_q, total_q]
  // Where num_splits > 1 parts of a sequence's keys leave their results to be merged.
  float* partial_out;  // [num_splits, total_q * num_heads_q, head_dim], not yet divided by the sum
  float* partial_stats;  // [num_splits, total_q * num_heads_q, 2], largest score in bits, and sum
  int64_t num_splits;
  int64_t total_q;
  int64_t batch;
  int64_t max_seqlen_q;
  int64_t num_heads_kv;
  int64_t group_size;  // query heads that share a key head
  int64_t head_dim;
  int64_t page_size;
  int64_t max_blocks;
  int64_t q_token_stride;
  int64_t q_head_stride;
  int64_t block_table_stride;
  int64_t window_left;   // -1: unlimited
  int64_t window_right;  // -1: unlimited
  float softmax_scale;
  float softcap;  // 0: off
  bool causal;
  DType dtype;
};
Error launch_paged_attention(const PagedAttentionParams& params, Stream stream);

// Keys [begin, end) of a sequence.
struct KeyRange {
  int64_t begin;
  int64_t end;
};

// What query i of num_queries sees of num_keys keys: the last query stands at the last key. Both
// ends grow with i. A table that is too short for num_keys ends the range, never a read past it.
static constexpr KeyRange visible_keys(const PagedAttentionParams& p, int64_t num_keys,
                                       int64_t num_queries, int64_t query) {
  const int64_t position = num_keys - num_queries + query;
  const int64_t capacity = p.max_blocks * p.page_size;
  const int64_t right = p.causal ? 0 : p.window_right;
  KeyRange keys{0, num_keys < capacity ? num_keys : capacity};
  if (right >= 0 && position + right + 1 < keys.end) keys.end = position + right + 1;
  if (p.window_left >= 0 && position - p.window_left > 0) keys.begin = position - p.window_left;
  if (keys.end < keys.begin) keys.end = keys.begin;
  return keys;
}

}  // namespace llamatelemetry
