// Attention without tensor cores: float32 on any GPU, and few queries over pages in any dtype. One
// block per (query token, query head); the keys of a head are read once per query, from L2 where
// they fit. Lengths and tables are read on the device, so a captured graph replays with others.
// Grid [total_q, num_heads_q], block kNumWarps * 32.
#include <cuda_fp8.h>

#include <type_traits>

#include "attention/launchers.h"
#include "attention/schedule.cuh"
#include "attention/simt/row.cuh"

namespace llamatelemetry {
namespace {

// position: of the query among its sequence's keys.
__device__ RowScoreRule rule_of(const AttentionParams& p, int64_t index, int64_t head,
                                int64_t position) {
  return {.softmax_scale = p.softmax_scale,
          .softcap = p.softcap,
          .alibi_slope =
              p.alibi_slopes == nullptr ? 0 : p.alibi_slopes[index * p.alibi_batch_stride + head],
          .position = position,
          .sink = p.sinks == nullptr ? -INFINITY : p.sinks[head]};
}

template <typename T, int kNumWarps>
__global__ void __launch_bounds__(kNumWarps* kWarpSize)
    attention_simt_kernel(const AttentionParams p) {
  const int64_t token = blockIdx.x;
  const int64_t head = blockIdx.y;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t index =
      packed ? sequence_of_token(p.cu_seqlens_q, p.batch, token) : token / p.seqlen_q;
  const SequenceSpan sequence = sequence_span(p, index);
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
  const RowScoreRule rule =
      rule_of(p, index, head, sequence.num_keys - sequence.num_queries + query);
  float* lse = packed ? p.lse + head * p.total_q + token
                      : p.lse + (index * p.num_heads_q + head) * p.seqlen_q + query;
  attend_row<T, kNumWarps>(
      q, window_keys(p.window_left, p.window_right, sequence.num_keys, sequence.num_queries, query),
      rows_of(p.k.rows), rows_of(p.v.rows), rule, static_cast<int>(p.head_dim),
      static_cast<T*>(p.out) + (token * p.num_heads_q + head) * p.head_dim, lse);
}

// A row of 8 bits, multiplied out.
struct ScaledRow {
  const uint8_t* data;
  float scale;
  bool is_int8;

  __device__ float operator[](int column) const {
    const uint8_t x = data[column];
    if (is_int8) return scale * static_cast<float>(static_cast<int8_t>(x));
    return scale * __half2float(__half(__nv_cvt_fp8_to_halfraw(x, __NV_E4M3)));
  }
};

template <typename T, int kNumWarps, bool kIs8Bit>
__global__ void __launch_bounds__(kNumWarps* kWarpSize)
    paged_attention_simt_kernel(const AttentionParams p) {
  const int64_t token = blockIdx.x;
  const int64_t head = blockIdx.y;
  const int64_t index = sequence_of_token(p.cu_seqlens_q, p.batch, token);
  const int64_t query = token - p.cu_seqlens_q[index];
  const int64_t num_queries = p.cu_seqlens_q[index + 1] - p.cu_seqlens_q[index];
  if (query >= num_queries) return;  // past the last sequence
  const int64_t num_keys = p.cache_seqlens[index];
  const int32_t* table = p.block_table + index * p.block_table_stride;
  using Stored = std::conditional_t<kIs8Bit, uint8_t, T>;
  const auto rows_of = [&](const KeyValueView& view) {
    const int64_t kv_head = head / p.group_size;
    const Stored* rows =
        static_cast<const Stored*>(view.rows.data) + kv_head * view.rows.head_stride;
    return [=, &view](int64_t key) {
      const int64_t page = table[key / view.page_size], slot = key % view.page_size;
      const Stored* row = rows + page * view.rows.batch_stride + slot * view.rows.token_stride;
      if constexpr (kIs8Bit) {
        const Heads& scales = view.scales;
        const float scale = static_cast<const float*>(
            scales.data)[page * scales.batch_stride + slot * scales.token_stride +
                         kv_head * scales.head_stride];
        return ScaledRow{row, scale, view.dtype == DType::kInt8};
      } else {
        return row;
      }
    };
  };
  const RowScoreRule rule = rule_of(p, index, head, num_keys - num_queries + query);
  attend_row<T, kNumWarps>(
      static_cast<const T*>(p.q.data) + token * p.q.token_stride + head * p.q.head_stride,
      paged_keys(p, num_keys, num_queries, query), rows_of(p.k), rows_of(p.v), rule,
      static_cast<int>(p.head_dim),
      static_cast<T*>(p.out) + (token * gridDim.y + head) * p.head_dim,
      p.lse + head * p.total_q + token);
}

constexpr int kNumWarps = 8;

}  // namespace

Error launch_simt(const AttentionParams& p, Stream stream) {
  const dim3 grid(p.total_q, p.num_heads_q);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    attention_simt_kernel<T, kNumWarps><<<grid, kNumWarps * kWarpSize, 0, stream>>>(p);
  });
  return last_launch_error();
}

Error launch_simt_paged(const AttentionParams& p, Stream stream) {
  const dim3 grid(p.total_q, p.num_heads_q);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = is_8_bit_cache(p.k.dtype)
                            ? paged_attention_simt_kernel<T, kNumWarps, true>
                            : paged_attention_simt_kernel<T, kNumWarps, false>;
    kernel<<<grid, kNumWarps * kWarpSize, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
