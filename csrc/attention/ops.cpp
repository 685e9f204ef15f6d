// Attention: checks, allocation and Params, compiled once for each library.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "attention/params.h"
#include "common/checks.h"

namespace llamatelemetry {
namespace {

PagedCache paged_cache_of(const Tensor& cache) {
  return {.data = cache.const_data_ptr(),
          .block_stride = cache.stride(0),
          .slot_stride = cache.stride(1),
          .head_stride = cache.stride(2)};
}

void check_lengths(const char* op, const char* arg, const Tensor& x, const char* meaning,
                   int64_t size, const Tensor& q) {
  check_shape(op, arg, x, meaning, {size});
  check_dtype(op, arg, x, ScalarType::Int);
  check_device(op, arg, x, "q", q);
  check_contiguous(op, arg, x);
}

void check_at_least(const char* op, const char* arg, int64_t value, int64_t least) {
  check(value >= least, op, arg, "be at least " + std::to_string(least), std::to_string(value));
}

// Into how many parts the keys of a sequence are cut, so that few queries over many keys use every
// thread. A function of shapes only, and not of the batch: a result does not depend on neighbours.
int64_t num_splits_of([[maybe_unused]] int64_t max_seqlen_q, [[maybe_unused]] int64_t capacity) {
#ifdef LT_CUDA
  return 1;
#else
  constexpr int64_t kFewQueries = 16;
  constexpr int64_t kMinKeys = 64;
  if (max_seqlen_q > kFewQueries) return 1;
  return std::clamp<int64_t>(capacity / kMinKeys, 1, num_threads());
#endif
}

std::tuple<Tensor, Tensor> paged_attention(const Tensor& q, const Tensor& k_cache,
                                           const Tensor& v_cache, const Tensor& block_table,
                                           const Tensor& cache_seqlens, const Tensor& cu_seqlens_q,
                                           int64_t max_seqlen_q, double softmax_scale, bool causal,
                                           int64_t window_left, int64_t window_right,
                                           double softcap) {
  constexpr const char* op = "paged_attention";
  const DType dtype = check_floating(op, "q", q);
  check_dim(op, "q", q, 3, "[total_q, num_heads_q, head_dim]");
  check_last_contiguous(op, "q", q);
  const int64_t total_q = q.size(0);
  const int64_t num_heads_q = q.size(1);
  const int64_t head_dim = q.size(2);
  check(head_dim % kHeadDimMultiple == 0 && head_dim > 0 && head_dim <= kMaxHeadDim, op, "head_dim",
        "be a multiple of " + std::to_string(kHeadDimMultiple) + " up to " +
            std::to_string(kMaxHeadDim),
        std::to_string(head_dim) + "; pad q, k_cache and v_cache with zeros");

  check_dim(op, "k_cache", k_cache, 4, "[num_blocks, page_size, num_heads_kv, head_dim]");
  const int64_t page_size = k_cache.size(1);
  const int64_t num_heads_kv = k_cache.size(2);
  check_at_least(op, "page_size", page_size, 1);
  check(num_heads_kv > 0 && num_heads_q % num_heads_kv == 0, op, "num_heads_q",
        "be a multiple of num_heads_kv = " + std::to_string(num_heads_kv),
        std::to_string(num_heads_q));
  for (const auto& [arg, cache] :
       {std::pair<const char*, const Tensor&>{"k_cache", k_cache}, {"v_cache", v_cache}}) {
    check_shape(op, arg, cache, "[num_blocks, page_size, num_heads_kv, head_dim] as q and k_cache",
                {k_cache.size(0), page_size, num_heads_kv, head_dim});
    check_like(op, arg, cache, "q", q);
    check_last_contiguous(op, arg, cache);
  }

  check_dim(op, "block_table", block_table, 2, "[batch, max_blocks]");
  const int64_t batch = block_table.size(0);
  check_dtype(op, "block_table", block_table, ScalarType::Int);
  check_device(op, "block_table", block_table, "q", q);
  check_last_contiguous(op, "block_table", block_table);
  check_lengths(op, "cache_seqlens", cache_seqlens, "[batch]", batch, q);
  check_lengths(op, "cu_seqlens_q", cu_seqlens_q, "[batch + 1]", batch + 1, q);
  check_at_least(op, "max_seqlen_q", max_seqlen_q, 0);
  check_at_least(op, "window_left", window_left, -1);
  check_at_least(op, "window_right", window_right, -1);
  check(std::isfinite(softmax_scale), op, "softmax_scale", "be finite",
        std::to_string(softmax_scale));
  check(softcap >= 0 && std::isfinite(softcap), op, "softcap",
        "be finite and not negative (0: off)", std::to_string(softcap));

  const DeviceGuard guard(q);
  Tensor out = allocate(q, q.sizes());
  Tensor lse = allocate(q, {num_heads_q, total_q}, ScalarType::Float);
  if (q.numel() == 0 || batch == 0) return {out, lse};
  const int64_t num_splits = num_splits_of(max_seqlen_q, block_table.size(1) * page_size);
  const int64_t num_partials = num_splits > 1 ? num_splits * total_q * num_heads_q : 0;
  Tensor partials = allocate(q, {num_partials, head_dim + 2}, ScalarType::Float);
  const PagedAttentionParams params{
      .q = q.const_data_ptr(),
      .k = paged_cache_of(k_cache),
      .v = paged_cache_of(v_cache),
      .block_table = block_table.const_data_ptr<int32_t>(),
      .cache_seqlens = cache_seqlens.const_data_ptr<int32_t>(),
      .cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>(),
      .out = out.mutable_data_ptr(),
      .lse = lse.mutable_data_ptr<float>(),
      .partial_out = partials.mutable_data_ptr<float>(),
      .partial_stats = partials.mutable_data_ptr<float>() + num_partials * head_dim,
      .num_splits = num_splits,
      .total_q = total_q,
      .batch = batch,
      .max_seqlen_q = max_seqlen_q,
      .num_heads_kv = num_heads_kv,
      .group_size = num_heads_q / num_heads_kv,
      .head_dim = head_dim,
      .page_size = page_size,
      .max_blocks = block_table.size(1),
      .q_token_stride = q.stride(0),
      .q_head_stride = q.stride(1),
      .block_table_stride = block_table.stride(0),
      .window_left = window_left,
      .window_right = window_right,
      .softmax_scale = static_cast<float>(softmax_scale),
      .softcap = static_cast<float>(softcap),
      .causal = causal,
      .dtype = dtype,
  };
  launch(op, launch_paged_attention, params, q);
  return {out, lse};
}

}  // namespace

LT_IMPL(m) { m.impl("paged_attention", TORCH_BOX(&paged_attention)); }

}  // namespace llamatelemetry
