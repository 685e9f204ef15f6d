// What the launchers of csrc/attention/ take, and which keys a query sees. Strides in elements; the
// last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "attention/choice.h"
#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

// Scores are kept in log2 units where exp2 is what the machine has.
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// A row's maximum is raised, and what it has accumulated rescaled, where a score is 2^kRescaleSlack
// above it: weights may grow as large. Exact, as every weight of the row and its sum use one
// maximum.
constexpr float kRescaleSlack = 8.0f;

// q, k, v or out: element c of (sequence b, token t, head h) lies at
// data + b * batch_stride + t * token_stride + h * head_stride + c. Where sequences are packed the
// token counts from the start of the tensor and batch_stride is 0.
struct Heads {
  const void* data;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};
// Whether each row of x lies at a multiple of 16 bytes; a dimension of one has any stride.
static inline constexpr bool rows_are_aligned(const Heads& x, int64_t batch, int64_t num_tokens,
                                              int64_t num_heads, int64_t element_bytes) {
  int64_t strides = 0;
  if (batch > 1) strides |= x.batch_stride;
  if (num_tokens > 1) strides |= x.token_stride;
  if (num_heads > 1) strides |= x.head_stride;
  const auto bytes = static_cast<uintptr_t>(strides * element_bytes);
  return (reinterpret_cast<uintptr_t>(x.data) | bytes) % 16 == 0;
}

// Keys or values. Dense: as q's Heads. Paged: token t of sequence b is slot t % page_size of page
// block_table[b, t / page_size], and rows.batch_stride is a page's.
struct KeyValueView {
  Heads rows;
  int64_t page_size;  // tokens of a page; 0: dense
  // Of 8 bits in pages, float32 by which stored numbers are multiplied: a token's and head's lies
  // as its row does, and strides are 0 where one serves many. Else without data.
  Heads scales;
  DType dtype;  // of what is stored
};

struct AttentionParams {
  Heads q;  // [batch, seqlen_q, num_heads_q, head_dim] or packed [total_q, num_heads_q, head_dim]
  KeyValueView k;  // as q with num_heads_kv; or [num_pages, page_size, num_heads_kv, head_dim]
  KeyValueView v;
  const int32_t* cu_seqlens_q;   // [batch + 1], where q is packed; else nullptr
  const int32_t* cu_seqlens_k;   // [batch + 1], where dense k and v are packed; else nullptr
  const int32_t* block_table;    // paged: [batch, max_pages], rows block_table_stride apart
  const int32_t* cache_seqlens;  // paged: [batch], keys of each sequence, its queries' own included
  const float* sinks;            // [num_heads_q] or nullptr: a score without a value
  const float* alibi_slopes;     // [num_heads_q], rows alibi_batch_stride apart, or nullptr
  void* out;                     // like q, contiguous
  float* lse;                    // [batch, num_heads_q, seqlen_q], packed [num_heads_q, total_q]
  // Split-KV workspace (plan.num_splits > 1): unnormalised outputs, and (row max in log2 units, row
  // sum). [num_splits, part_tokens * num_heads_q, head_dim] and [num_splits, part_tokens *
  // num_heads_q, 2].
  // Decode (plan.num_blocks > 0) where splits are not fixed: a part a block, of 16 rows, or of 64
  // where plan.is_wide. Either way a flag for each block, which counts where it is launch_number.
  // kSm90 (plan.num_splits > 1): normalised, [num_splits] times out's shape and lse's.
  float* partial_out;
  float* partial_stats;
  int64_t part_tokens;  // total_q; with plan.max_queries: or batch times that, if fewer
  uint64_t* part_flags;
  uint64_t launch_number;
  int32_t* tile_counter;  // [1], what kSm90 schedules its tiles with; else nullptr
  // kSm90 with plan.min_queries > 0: [1 + batch], how many sequences it serves, and which; else
  // nullptr.
  int32_t* served;
  int64_t block_table_stride;
  int64_t num_pages;  // of the cache
  int64_t alibi_batch_stride;
  int64_t batch;
  int64_t seqlen_q;  // of every sequence; packed: the most of any
  int64_t seqlen_k;  // likewise; paged: what the pages of a sequence can hold
  int64_t total_q;   // tokens of q and out in all: batch * seqlen_q, or the packed ones
  int64_t total_k;   // paged: seqlen_k
  int64_t num_heads_q;
  int64_t num_heads_kv;
  int64_t group_size;  // query heads that share a key head
  int64_t head_dim;
  int64_t window_left;   // -1: unlimited
  int64_t window_right;  // -1: unlimited; 0: causal
  float softmax_scale;
  float softcap;  // 0: off
  DType dtype;    // of q and out
  AttentionPlan plan;
};
// One each for ops_dense.cpp and ops_paged.cpp: they run what plan says.
Error launch_dense_attention(const AttentionParams& params, Stream stream);
Error launch_paged_attention(const AttentionParams& params, Stream stream);

// Whether scores need more than a positive factor, which the exponential's argument takes along:
// softcap, ALiBi, or a scale that is not positive (or no number).
static inline constexpr bool needs_score_rule(const AttentionParams& p) {
  return p.softcap > 0 || p.alibi_slopes != nullptr || !(p.softmax_scale > 0);
}

// What scores take besides their scale.
static inline constexpr bool has_score_terms(const AttentionParams& p) {
  return p.softcap > 0 || p.alibi_slopes != nullptr;
}

// Where one sequence lies: its first token in q and k, and how many tokens it has there.
struct SequenceSpan {
  int64_t first_query;
  int64_t num_queries;
  int64_t first_key;
  int64_t num_keys;
};
// num_queries, or 0 where the sequence is another kernel's.
static inline constexpr int64_t served_queries(const AttentionPlan& plan, int64_t num_queries) {
  const bool is_served =
      num_queries >= plan.min_queries && (plan.max_queries == 0 || num_queries <= plan.max_queries);
  return is_served ? num_queries : 0;
}
static inline constexpr SequenceSpan sequence_span(const AttentionParams& p, int64_t index) {
  if (p.cu_seqlens_q == nullptr) return {0, p.seqlen_q, 0, p.seqlen_k};
  const int64_t query = p.cu_seqlens_q[index];
  if (p.k.page_size > 0) {
    return {query, served_queries(p.plan, p.cu_seqlens_q[index + 1] - query), 0,
            p.cache_seqlens[index]};
  }
  const int64_t key = p.cu_seqlens_k[index];
  return {query, p.cu_seqlens_q[index + 1] - query, key, p.cu_seqlens_k[index + 1] - key};
}
// The last sequence that starts at or before the token: the one that holds it, as sequences without
// queries start where the next one does.
static inline constexpr int64_t sequence_of_token(const int32_t* cu_seqlens_q, int64_t batch,
                                                  int64_t token) {
  int64_t low = 0;
  int64_t high = batch;  // cu_seqlens_q[low] <= token, cu_seqlens_q[high] is taken as greater
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens_q[middle] <= token ? low : high) = middle;
  }
  return low;
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

// As window_keys over pages. A table that is too short for num_keys ends the range, never a read
// past it.
static inline constexpr KeyRange paged_keys(const AttentionParams& p, int64_t num_keys,
                                            int64_t num_queries, int64_t query) {
  const int64_t capacity = p.seqlen_k;
  KeyRange keys = window_keys(p.window_left, p.window_right, num_keys, num_queries, query);
  if (keys.end > capacity) keys.end = capacity;
  if (keys.begin > capacity) keys.begin = capacity;
  if (keys.end < keys.begin) keys.end = keys.begin;
  return keys;
}

}  // namespace llamatelemetry
