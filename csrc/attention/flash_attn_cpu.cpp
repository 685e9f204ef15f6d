// out[i] = sum_j softmax_j(score(q[i] . k[j])) v[j] over the keys j that query i sees.
//                                                  (online softmax: Milakov & Gimelshein 2018)
// One item per (sequence, query head, query); accumulates in float.
#include <cmath>

#include "attention/params.h"
#include "common/parallel.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

using Params = FlashAttnParams;

constexpr float kNoScore =
    -3.4028234664e38f;  // below every finite score, and no NaN when subtracted

template <typename T>
const T* row_of(const Heads& x, int64_t sequence, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + sequence * x.batch_stride + token * x.token_stride +
         head * x.head_stride;
}

template <typename T>
void attend_row(const Params& p, int64_t sequence, const FlashSequence& s, int64_t head,
                int64_t query) {
  const int64_t kv_head = head / (p.num_heads_q / p.num_heads_kv);
  const T* q = row_of<T>(p.q, sequence, s.first_query + query, head);
  const KeyRange keys =
      window_keys(p.window_left, p.window_right, s.num_keys, s.num_queries, query);
  const int64_t position = s.num_keys - s.num_queries + query;
  const float slope =
      p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[sequence * p.alibi_batch_stride + head];
  const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[head];

  alignas(64) float o[kMaxHeadDim] = {};
  float largest = sink > kNoScore ? sink : kNoScore;
  float sum = sink == -INFINITY ? 0.0f : expf(sink - largest);
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const T* key = row_of<T>(p.k, sequence, s.first_key + j, kv_head);
    const T* value = row_of<T>(p.v, sequence, s.first_key + j, kv_head);
    float score = p.softmax_scale * sum_row(p.head_dim, [&](Vec total, int64_t c, auto lanes) {
                    return vec_fma(vec_load(q + c, lanes), vec_load(key + c, lanes), total);
                  });
    if (p.softcap > 0) score = p.softcap * tanhf(score / p.softcap);
    if (slope != 0) score -= slope * fabsf(static_cast<float>(position - j));
    const float before = largest;
    largest = score > largest ? score : largest;
    const float scale = expf(before - largest);
    const float weight = expf(score - largest);
    sum = sum * scale + weight;
    for_each_vec(p.head_dim, [&](int64_t c, auto lanes) {
      const Vec old = vec_load(o + c, lanes) * vec_set(scale);
      vec_store(o + c, lanes, vec_fma(vec_load(value + c, lanes), vec_set(weight), old));
    });
  }
  const int64_t token = s.first_query + query;
  const int64_t out_token = p.cu_seqlens_q == nullptr ? sequence * p.seqlen_q + token : token;
  T* out = static_cast<T*>(p.out) + (out_token * p.num_heads_q + head) * p.head_dim;
  const float factor = sum == 0 ? 0.0f : 1.0f / sum;
  for_each_vec(p.head_dim, [&](int64_t c, auto lanes) {
    vec_store(out + c, lanes, vec_load(o + c, lanes) * vec_set(factor));
  });
  const int64_t lse_row = p.cu_seqlens_q == nullptr ? sequence * p.num_heads_q + head : head;
  const int64_t lse_length = p.cu_seqlens_q == nullptr ? p.seqlen_q : p.total_q;
  p.lse[lse_row * lse_length + token] = sum == 0 ? -INFINITY : largest + logf(sum);
}

template <typename T>
void attend_rows(const Params& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t query = item % p.seqlen_q;
    const int64_t head = item / p.seqlen_q % p.num_heads_q;
    const int64_t sequence = item / p.seqlen_q / p.num_heads_q;
    const FlashSequence s = flash_sequence(p, sequence);
    if (query < s.num_queries) attend_row<T>(p, sequence, s, head, query);
  }
}

void rows_body(const Params& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { attend_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_flash_attn(const Params& p, Stream) {
  const double item_ns = 0.1 * static_cast<double>(p.seqlen_k * p.head_dim);
  parallel_over<rows_body>("flash_attn", {p.batch * p.num_heads_q * p.seqlen_q, item_ns}, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_flash_attn, FlashAttnParams)
