// out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j] over the keys j that query i sees,
// kept in pages of a cache. The kernel for every case and every GPU: one block per (query token,
// query head). Lengths and tables are read on the device, so a captured graph replays with others.
// Grid [total_q, num_heads_q], block kNumWarps * 32.
#pragma once

#include "attention/attend_row.cuh"

namespace llamatelemetry {

template <typename T, int kNumWarps>
__global__ void __launch_bounds__(kNumWarps* kWarpSize)
    paged_attention_kernel(const PagedAttentionParams p) {
  const int64_t token = blockIdx.x;
  const int64_t head = blockIdx.y;
  const int64_t sequence = sequence_of_token(p.cu_seqlens_q, p.batch, token);
  const int64_t query = token - p.cu_seqlens_q[sequence];
  const int64_t num_queries = p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence];
  if (query >= num_queries) return;  // past the last sequence
  const int64_t num_keys = p.cache_seqlens[sequence];
  const int32_t* table = p.block_table + sequence * p.block_table_stride;
  const auto rows_of = [&](const PagedCache& cache) {
    const T* head_rows =
        static_cast<const T*>(cache.data) + head / p.group_size * cache.head_stride;
    return [=, page_size = p.page_size](int64_t key) {
      return head_rows + table[key / page_size] * cache.block_stride +
             key % page_size * cache.slot_stride;
    };
  };
  const ScoreRule rule{.softmax_scale = p.softmax_scale,
                       .softcap = p.softcap,
                       .alibi_slope = 0,
                       .position = num_keys - num_queries + query,
                       .sink = -INFINITY};
  attend_row<T, kNumWarps>(
      static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride,
      visible_keys(p, num_keys, num_queries, query), rows_of(p.k), rows_of(p.v), rule,
      static_cast<int>(p.head_dim),
      static_cast<T*>(p.out) + (token * gridDim.y + head) * p.head_dim,
      p.lse + head * p.total_q + token);
}

}  // namespace llamatelemetry
