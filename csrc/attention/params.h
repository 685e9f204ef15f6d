// What the launchers of csrc/attention/ take, and which keys a query sees. Strides in elements; the
// last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "attention/flash_choice.h"
#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

// Scores are kept in units of log2 where exp2 is what the machine has.
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// From so many queries of a sequence on, tiles of them fill the tensor cores well enough.
constexpr int kManyQueries = 16;

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
  float* partial_stats;   // [num_splits, total_q * num_heads_q, 2], largest score in bits, and sum
  int32_t* tile_counter;  // as in FlashAttnParams, from kManyQueries on
  int64_t num_splits;
  int64_t total_q;
  int64_t batch;
  int64_t max_seqlen_q;
  int64_t num_heads_kv;
  int64_t group_size;  // query heads that share a key head
  int64_t head_dim;
  int64_t num_blocks;  // of the cache
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

// q, k, v or out of flash_attn: element c of (sequence b, token t, head h) lies at
// data + b * batch_stride + t * token_stride + h * head_stride + c. Where lengths are packed the
// token counts from the start of the tensor and batch_stride is 0.
struct Heads {
  const void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};
// Whether each row of x lies at a multiple of 16 bytes; a dimension of one has any stride.
static inline bool rows_are_aligned(const Heads& x, int64_t batch, int64_t num_tokens,
                                    int64_t num_heads, int64_t element_bytes) {
  int64_t strides = 0;
  if (batch > 1) strides |= x.batch_stride;
  if (num_tokens > 1) strides |= x.token_stride;
  if (num_heads > 1) strides |= x.head_stride;
  const auto bytes = static_cast<uintptr_t>(strides * element_bytes);
  return (reinterpret_cast<uintptr_t>(x.data) | bytes) % 16 == 0;
}

struct FlashAttnParams {
  Heads q;  // [batch, seqlen_q, num_heads_q, head_dim] or [total_q, num_heads_q, head_dim]
  Heads k;  // [batch, seqlen_k, num_heads_kv, head_dim] or [total_k, num_heads_kv, head_dim]
  Heads v;
  const int32_t* cu_seqlens_q;  // [batch + 1], where lengths are packed; else nullptr
  const int32_t* cu_seqlens_k;  // [batch + 1], likewise
  // Where keys lie in pages: token t of sequence b is slot t % page_size of block
  // block_table[b * block_table_stride + t / page_size], and batch_stride of k and v is a block's.
  // page_size 0 where they do not.
  const int32_t* block_table;
  const int32_t* cache_seqlens;  // [batch], keys of each sequence
  const float* sinks;            // [num_heads_q] or nullptr: a score without a value
  const float* alibi_slopes;     // [num_heads_q], rows alibi_batch_stride apart, or nullptr
  void* out;                     // like q, contiguous
  float* lse;                    // [batch, num_heads_q, seqlen_q] or [num_heads_q, total_q]
  int32_t* tile_counter;         // [1], what kSm90 deals its work out with; else nullptr
  int64_t block_table_stride;
  int64_t page_size;
  int64_t num_blocks;  // of the cache
  int64_t alibi_batch_stride;
  int64_t batch;
  int64_t seqlen_q;  // of every sequence, or the most of any where lengths are packed
  int64_t seqlen_k;  // where keys lie in pages, what the pages of a sequence can hold
  int64_t total_q;   // tokens of q and out in all: batch * seqlen_q, or the packed ones
  int64_t total_k;
  int64_t num_heads_q;
  int64_t num_heads_kv;
  int64_t head_dim;
  int64_t window_left;   // -1: unlimited
  int64_t window_right;  // -1: unlimited; 0: causal
  float softmax_scale;
  float softcap;  // 0: off
  DType dtype;
  FlashImpl impl;  // never kAuto here
};
Error launch_flash_attn(const FlashAttnParams& params, Stream stream);

// Where one sequence lies: its first token in q and k, and how many tokens it has there.
struct FlashSequence {
  int64_t first_query;
  int64_t num_queries;
  int64_t first_key;
  int64_t num_keys;
};
static inline constexpr FlashSequence flash_sequence(const FlashAttnParams& p, int64_t index) {
  if (p.cu_seqlens_q == nullptr) return {0, p.seqlen_q, 0, p.seqlen_k};
  const int64_t query = p.cu_seqlens_q[index];
  if (p.page_size > 0) {
    return {query, p.cu_seqlens_q[index + 1] - query, 0, p.cache_seqlens[index]};
  }
  const int64_t key = p.cu_seqlens_k[index];
  return {query, p.cu_seqlens_q[index + 1] - query, key, p.cu_seqlens_k[index + 1] - key};
}

// Keys [begin, end) of a sequence.
struct KeyRange {
  int64_t begin;
  int64_t end;
};

// What query i of num_queries sees of num_keys keys: the last query stands at the last key. Both
// ends grow with i. -1 is an unlimited side of the window.
static inline constexpr KeyRange window_keys(int64_t left, int64_t right, int64_t num_keys,
                                             int64_t num_queries, int64_t query) {
  const int64_t position = num_keys - num_queries + query;
  KeyRange keys{0, num_keys};
  if (right >= 0 && position + right + 1 < keys.end) keys.end = position + right + 1;
  if (left >= 0 && position - left > 0) keys.begin = position - left;
  if (keys.begin > num_keys) keys.begin = num_keys;
  if (keys.end < keys.begin) keys.end = keys.begin;
  return keys;
}

// As window_keys over a paged cache. A table that is too short for num_keys ends the range, never
// a read past it.
static inline constexpr KeyRange visible_keys(const PagedAttentionParams& p, int64_t num_keys,
                                              int64_t num_queries, int64_t query) {
  const int64_t capacity = p.max_blocks * p.page_size;
  KeyRange keys =
      window_keys(p.window_left, p.causal ? 0 : p.window_right, num_keys, num_queries, query);
  if (keys.end > capacity) keys.end = capacity;
  if (keys.begin > capacity) keys.begin = capacity;
  if (keys.end < keys.begin) keys.end = keys.begin;
  return keys;
}

}  // namespace llamatelemetry
