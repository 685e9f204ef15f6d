// flash_attn without tensor cores: float32 on any GPU. One block per (query token, query head); the
// keys of a head are read once per query, from L2 where they fit.
// Grid [total_q, num_heads_q], block kNumWarps * 32.
#include "attention/attend_row.cuh"
#include "attention/flash_fwd.h"

namespace llamatelemetry {
namespace {

template <typename T, int kNumWarps>
__global__ void __launch_bounds__(kNumWarps* kWarpSize)
    flash_fwd_simt_kernel(const FlashAttnParams p) {
  const int64_t token = blockIdx.x;
  const int64_t head = blockIdx.y;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t index =
      packed ? sequence_of_token(p.cu_seqlens_q, p.batch, token) : token / p.seqlen_q;
  const FlashSequence sequence = flash_sequence(p, index);
  const int64_t query = packed ? token - sequence.first_query : token % p.seqlen_q;
  if (query >= sequence.num_queries) return;  // past the last sequence
  const int64_t kv_head = head / (p.num_heads_q / p.num_heads_kv);
  const auto rows_of = [&](const Heads& x) {
    const T* first = static_cast<const T*>(x.data) + index * x.batch_stride +
                     sequence.first_key * x.token_stride + kv_head * x.head_stride;
    return [first, stride = x.token_stride](int64_t key) { return first + key * stride; };
  };
  const T* q = static_cast<const T*>(p.q.data) + index * p.q.batch_stride +
               (sequence.first_query + query) * p.q.token_stride + head * p.q.head_stride;
  const ScoreRule rule{.softmax_scale = p.softmax_scale,
                       .softcap = p.softcap,
                       .alibi_slope = p.alibi_slopes == nullptr
                                          ? 0
                                          : p.alibi_slopes[index * p.alibi_batch_stride + head],
                       .position = sequence.num_keys - sequence.num_queries + query,
                       .sink = p.sinks == nullptr ? -INFINITY : p.sinks[head]};
  float* lse = packed ? p.lse + head * p.total_q + token
                      : p.lse + (index * p.num_heads_q + head) * p.seqlen_q + query;
  attend_row<T, kNumWarps>(
      q, window_keys(p.window_left, p.window_right, sequence.num_keys, sequence.num_queries, query),
      rows_of(p.k), rows_of(p.v), rule, static_cast<int>(p.head_dim),
      static_cast<T*>(p.out) + (token * p.num_heads_q + head) * p.head_dim, lse);
}

}  // namespace

Error launch_flash_fwd_simt(const FlashAttnParams& p, Stream stream) {
  constexpr int kNumWarps = 8;
  const dim3 grid(p.total_q, p.num_heads_q);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    flash_fwd_simt_kernel<T, kNumWarps><<<grid, kNumWarps * kWarpSize, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
