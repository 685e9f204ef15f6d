// out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j] over the keys j that query i sees,
// kept in pages of a cache.                            (online softmax: Milakov & Gimelshein 2018)
// The kernel for every case and every GPU: one block per (query token, query head). Its warps take
// turns at steps of kStepKeys keys, each with its own online softmax; a warp's lanes share
// head_dim. Lengths and tables are read on the device, so a captured graph replays with others.
// Grid [total_q, num_heads_q], block kNumWarps * 32. Accumulates in float.
#pragma once

#include <cfloat>
#include <cstdint>

#include "attention/params.h"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

// The last sequence that starts at or before the token: the one that holds it, as sequences without
// queries start where the next one does.
__device__ inline int64_t sequence_of_token(const PagedAttentionParams& p, int64_t token) {
  int64_t low = 0;
  int64_t high = p.batch;  // cu_seqlens_q[low] <= token, cu_seqlens_q[high] is taken as greater
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.cu_seqlens_q[middle] <= token ? low : high) = middle;
  }
  return low;
}

template <typename T>
__device__ inline const T* row_of_key(const PagedCache& cache, const int32_t* table,
                                      int64_t page_size, int64_t kv_head, int64_t key) {
  return static_cast<const T*>(cache.data) + table[key / page_size] * cache.block_stride +
         key % page_size * cache.slot_stride + kv_head * cache.head_stride;
}

template <typename T, int kNumWarps>
__global__ void __launch_bounds__(kNumWarps* kWarpSize)
    paged_attention_kernel(const PagedAttentionParams p) {
  constexpr int kStepKeys = 4;
  constexpr int kElements = kMaxHeadDim / kWarpSize;  // of a row, per lane
  __shared__ float s_o[kNumWarps][kMaxHeadDim];
  __shared__ float s_largest[kNumWarps];
  __shared__ float s_sum[kNumWarps];

  const int64_t token = blockIdx.x;
  const int64_t head = blockIdx.y;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t sequence = sequence_of_token(p, token);
  const int64_t first = p.cu_seqlens_q[sequence];
  const int64_t num_queries = p.cu_seqlens_q[sequence + 1] - first;
  if (token - first >= num_queries) return;  // past the last sequence
  const KeyRange keys = visible_keys(p, p.cache_seqlens[sequence], num_queries, token - first);
  const int32_t* table = p.block_table + sequence * p.block_table_stride;
  const int64_t kv_head = head / p.group_size;

  // Lane l holds elements l, l + 32, ... of the query, of each row and of the result.
  const T* query = static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
  float r_q[kElements];
  float r_o[kElements] = {};
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int c = e * kWarpSize + lane;
    r_q[e] = c < p.head_dim ? to_float(query[c]) : 0.0f;
  }
  float largest = -FLT_MAX;  // below every score, and no NaN when subtracted
  float sum = 0.0f;
  for (int64_t step = keys.begin + warp * kStepKeys; step < keys.end;
       step += kNumWarps * kStepKeys) {
    float score[kStepKeys];
    float step_largest = largest;
#pragma unroll
    for (int u = 0; u < kStepKeys; ++u) {
      score[u] = -INFINITY;
      if (step + u >= keys.end) continue;
      const T* key = row_of_key<T>(p.k, table, p.page_size, kv_head, step + u);
      float dot = 0.0f;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int c = e * kWarpSize + lane;
        if (c < p.head_dim) dot += r_q[e] * to_float(key[c]);
      }
      dot = warp_reduce<Sum>(dot) * p.softmax_scale;
      score[u] = p.softcap > 0 ? p.softcap * tanhf(dot / p.softcap) : dot;
      step_largest = fmaxf(step_largest, score[u]);
    }
    const float scale = expf(largest - step_largest);
    largest = step_largest;
    sum *= scale;
#pragma unroll
    for (int e = 0; e < kElements; ++e) r_o[e] *= scale;
#pragma unroll
    for (int u = 0; u < kStepKeys; ++u) {
      if (step + u >= keys.end) continue;
      const T* value = row_of_key<T>(p.v, table, p.page_size, kv_head, step + u);
      const float weight = expf(score[u] - largest);
      sum += weight;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int c = e * kWarpSize + lane;
        if (c < p.head_dim) r_o[e] += weight * to_float(value[c]);
      }
    }
  }

  // Merge the warps in their order. Without a key every sum is 0.
#pragma unroll
  for (int e = 0; e < kElements; ++e) s_o[warp][e * kWarpSize + lane] = r_o[e];
  if (lane == 0) {
    s_largest[warp] = largest;
    s_sum[warp] = sum;
  }
  __syncthreads();
  largest = -FLT_MAX;
  for (int w = 0; w < kNumWarps; ++w) largest = fmaxf(largest, s_largest[w]);
  sum = 0.0f;
  for (int w = 0; w < kNumWarps; ++w) sum += s_sum[w] * expf(s_largest[w] - largest);
  const int64_t num_heads_q = gridDim.y;
  T* out = static_cast<T*>(p.out) + (token * num_heads_q + head) * p.head_dim;
  for (int c = threadIdx.x; c < p.head_dim; c += kNumWarps * kWarpSize) {
    float o = 0.0f;
    for (int w = 0; w < kNumWarps; ++w) o += s_o[w][c] * expf(s_largest[w] - largest);
    out[c] = from_float<T>(sum == 0.0f ? 0.0f : o / sum);
  }
  if (threadIdx.x == 0) {
    p.lse[head * p.total_q + token] = sum == 0.0f ? -INFINITY : largest + logf(sum);
  }
}

}  // namespace llamatelemetry
