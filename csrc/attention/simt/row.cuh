// One query row over its keys, for every case and every GPU: what flash_attn runs in float32, and
// paged_attention there and for few queries.       (online softmax: Milakov & Gimelshein 2018)
// A block of kNumWarps warps works on the row. Warps take turns at steps of kStepKeys keys, each
// with its own online softmax; a warp's lanes share head_dim. Accumulates in float.
#pragma once

#include <cfloat>
#include <cstdint>

#include "attention/params.h"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

// From dot product to score: softcap * tanh(dot * softmax_scale / softcap) - alibi_slope *
// distance.
struct RowScoreRule {
  float softmax_scale;
  float softcap;      // 0: off
  float alibi_slope;  // 0: off
  int64_t position;   // of the query among the keys
  float sink;         // a score without a value; -inf: off
};

__device__ inline float score_of(const RowScoreRule& rule, float dot, int64_t key) {
  float score = dot * rule.softmax_scale;
  if (rule.softcap > 0) score = rule.softcap * tanhf(score / rule.softcap);
  if (rule.alibi_slope != 0) {
    score -= rule.alibi_slope * fabsf(static_cast<float>(rule.position - key));
  }
  return score;
}

// key_row(j) and value_row(j) are row j of the sequence, whose elements [c] to_float takes. Without
// a key out is 0 and lse that of the sink, -inf where there is none. Every thread of the block must
// call it.
template <typename T, int kNumWarps, typename KeyRow, typename ValueRow>
__device__ void attend_row(const T* query, KeyRange keys, KeyRow key_row, ValueRow value_row,
                           const RowScoreRule& rule, int head_dim, T* out, float* lse) {
  constexpr int kStepKeys = 4;
  constexpr int kElements = kMaxHeadDim / kWarpSize;  // of a row, per lane
  __shared__ float s_o[kNumWarps][kMaxHeadDim];
  __shared__ float s_row_max[kNumWarps];
  __shared__ float s_sum[kNumWarps];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;

  // Lane l holds elements l, l + 32, ... of the query, of each row and of the result.
  float r_q[kElements];
  float r_o[kElements] = {};
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int c = e * kWarpSize + lane;
    r_q[e] = c < head_dim ? to_float(query[c]) : 0.0f;
  }
  float row_max = -FLT_MAX;  // below every score, and no NaN when subtracted
  float sum = 0.0f;
  for (int64_t step = keys.begin + warp * kStepKeys; step < keys.end;
       step += kNumWarps * kStepKeys) {
    float score[kStepKeys];
    float step_max = row_max;
#pragma unroll
    for (int u = 0; u < kStepKeys; ++u) {
      score[u] = -INFINITY;
      if (step + u >= keys.end) continue;
      const auto key = key_row(step + u);
      float dot = 0.0f;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int c = e * kWarpSize + lane;
        if (c < head_dim) dot += r_q[e] * to_float(key[c]);
      }
      score[u] = score_of(rule, warp_reduce<Sum>(dot), step + u);
      step_max = fmaxf(step_max, score[u]);
    }
    const float scale = expf(row_max - step_max);
    row_max = step_max;
    sum *= scale;
#pragma unroll
    for (int e = 0; e < kElements; ++e) r_o[e] *= scale;
#pragma unroll
    for (int u = 0; u < kStepKeys; ++u) {
      if (step + u >= keys.end) continue;
      const auto value = value_row(step + u);
      const float weight = expf(score[u] - row_max);
      sum += weight;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int c = e * kWarpSize + lane;
        if (c < head_dim) r_o[e] += weight * to_float(value[c]);
      }
    }
  }

  // Merge the warps in their order. Without a key every sum is 0.
#pragma unroll
  for (int e = 0; e < kElements; ++e) s_o[warp][e * kWarpSize + lane] = r_o[e];
  if (lane == 0) {
    s_row_max[warp] = row_max;
    s_sum[warp] = sum;
  }
  __syncthreads();
  row_max = fmaxf(-FLT_MAX, rule.sink);
  for (int w = 0; w < kNumWarps; ++w) row_max = fmaxf(row_max, s_row_max[w]);
  sum = rule.sink == -INFINITY ? 0.0f : expf(rule.sink - row_max);
  for (int w = 0; w < kNumWarps; ++w) sum += s_sum[w] * expf(s_row_max[w] - row_max);
  for (int c = threadIdx.x; c < head_dim; c += kNumWarps * kWarpSize) {
    float o = 0.0f;
    for (int w = 0; w < kNumWarps; ++w) o += s_o[w][c] * expf(s_row_max[w] - row_max);
    out[c] = from_float<T>(sum == 0.0f ? 0.0f : o / sum);
  }
  if (threadIdx.x == 0) *lse = sum == 0.0f ? -INFINITY : row_max + logf(sum);
}

}  // namespace llamatelemetry
