// Attention over a paged cache: checks, allocation and params, compiled once for each library.
#include <tuple>
#include <utility>

#include "attention/ops_checks.h"
#include "binding/cache_scales.h"

namespace llamatelemetry {
namespace {

struct PagedTensors {
  const Tensor& q;
  const Tensor& k_cache;
  const Tensor& v_cache;
  const Tensor& block_table;
  const Tensor& cache_seqlens;
  const Tensor& cu_seqlens_q;
  const std::optional<Tensor>& k_scales;
  const std::optional<Tensor>& v_scales;
};

// The dtype of the caches: q's, 8 bits with scales, or on the CPU 16 bits beside float32.
DType check_stored(const char* op, const PagedTensors& t) {
  check_dim(op, "k_cache", t.k_cache, 4, "[num_blocks, page_size, num_heads_kv, head_dim]");
  check_cache_scales(op, t.k_cache, t.k_scales, t.v_scales);
  if (!is_converted(t.q, t.k_cache)) {
    const bool takes_16_bits = !kOnCuda && t.q.scalar_type() == ScalarType::Float;
    check(t.k_cache.scalar_type() == t.q.scalar_type(), op, "k_cache",
          std::string("have the dtype of q (") + dtype_text(t.q.scalar_type()) + ")" +
              (takes_16_bits ? ", float16 or bfloat16" : ""),
          dtype_text(t.k_cache.scalar_type()));
  }
  check_device(op, "k_cache", t.k_cache, "q", t.q);
  return *dtype_of(t.k_cache.scalar_type());
}

void check_cache(const char* op, const PagedTensors& t) {
  check_at_least(op, "page_size", t.k_cache.size(1), 1);
  check_heads(op, t.q.size(1), t.k_cache.size(2));
  for (const auto& [arg, cache] :
       {std::pair<const char*, const Tensor&>{"k_cache", t.k_cache}, {"v_cache", t.v_cache}}) {
    check_shape(op, arg, cache, "[num_blocks, page_size, num_heads_kv, head_dim] as q and k_cache",
                {t.k_cache.size(0), t.k_cache.size(1), t.k_cache.size(2), t.q.size(2)});
    check_like(op, arg, cache, "k_cache", t.k_cache);
    check_last_contiguous(op, arg, cache);
  }
}

void check_tables(const char* op, const PagedTensors& t) {
  check_dim(op, "block_table", t.block_table, 2, "[batch, max_blocks]");
  const int64_t batch = t.block_table.size(0);
  check_dtype(op, "block_table", t.block_table, ScalarType::Int);
  check_device(op, "block_table", t.block_table, "q", t.q);
  check_last_contiguous(op, "block_table", t.block_table);
  check_lengths(op, "cache_seqlens", t.cache_seqlens, "[batch]", batch, t.q);
  check_lengths(op, "cu_seqlens_q", t.cu_seqlens_q, "[batch + 1]", batch + 1, t.q);
  check_starts(op, "cu_seqlens_q", t.cu_seqlens_q, "q", t.q.size(0));
}

void check_splits(const char* op, int64_t num_splits, int64_t split_size) {
  constexpr int64_t kMaxSplits = 1 << 16;
  check(num_splits >= 0 && num_splits <= kMaxSplits, op, "num_splits",
        "lie in [0, " + std::to_string(kMaxSplits) + "] (0: the kernel chooses)",
        std::to_string(num_splits));
  check(split_size >= 0 && split_size % kSplitMultiple == 0 && split_size <= kMaxSplitKeys, op,
        "split_size",
        "be a multiple of " + std::to_string(kSplitMultiple) + " up to " +
            std::to_string(kMaxSplitKeys) + " (0: the kernel chooses)",
        std::to_string(split_size));
  check(num_splits == 0 || split_size == 0, op, "num_splits", "be 0 beside a split_size",
        std::to_string(num_splits));
}

Heads heads_of_scales(const Tensor& scales) {
  const ScaleStrides strides = scale_strides_of(scales);
  return {scales.const_data_ptr(), strides.block, strides.slot, strides.head};
}

KeyValueView pages_of(const Tensor& cache, const std::optional<Tensor>& scales, DType dtype) {
  return {.rows = heads_of(cache),
          .page_size = cache.size(1),
          .scales = scales ? heads_of_scales(*scales) : Heads{},
          .dtype = dtype};
}

// Everything but what is allocated and the plan.
AttentionParams paged_params(const PagedTensors& t, DType dtype, DType stored,
                             int64_t max_seqlen_q) {
  AttentionParams p{};
  p.q = heads_of(t.q);
  p.k = pages_of(t.k_cache, t.k_scales, stored);
  p.v = pages_of(t.v_cache, t.v_scales, stored);
  p.cu_seqlens_q = t.cu_seqlens_q.const_data_ptr<int32_t>();
  p.block_table = t.block_table.const_data_ptr<int32_t>();
  p.cache_seqlens = t.cache_seqlens.const_data_ptr<int32_t>();
  p.block_table_stride = t.block_table.stride(0);
  p.num_pages = t.k_cache.size(0);
  p.batch = t.block_table.size(0);
  p.seqlen_q = max_seqlen_q;
  p.seqlen_k = p.num_pages > 0 ? t.block_table.size(1) * p.k.page_size : 0;
  p.total_q = t.q.size(0);
  p.total_k = p.seqlen_k;
  p.num_heads_q = t.q.size(1);
  p.num_heads_kv = t.k_cache.size(2);
  p.group_size = p.num_heads_q / p.num_heads_kv;
  p.head_dim = t.q.size(2);
  p.dtype = dtype;
  return p;
}

std::tuple<Tensor, Tensor> paged_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
    const Tensor& cache_seqlens, const Tensor& cu_seqlens_q, int64_t max_seqlen_q,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    std::optional<StringHandle> backend_handle, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& alibi_slopes, int64_t num_splits, int64_t split_size,
    const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales) {
  const auto backend = take_string(backend_handle);
  constexpr const char* op = "paged_attention";
  const DType dtype = check_floating(op, "q", q);
  check_dim(op, "q", q, 3, "[total_q, num_heads_q, head_dim]");
  check_last_contiguous(op, "q", q);
  check_head_dim(op, q.size(2));
  const PagedTensors tensors{q,        k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q,
                             k_scales, v_scales};
  const DType stored = check_stored(op, tensors);
  check_cache(op, tensors);
  check_tables(op, tensors);
  check_at_least(op, "max_seqlen_q", max_seqlen_q, 0);
  check_splits(op, num_splits, split_size);
  const DeviceGuard guard(q);
  AttentionParams params = paged_params(tensors, dtype, stored, max_seqlen_q);
  set_scores(op, params, q,
             {sinks, alibi_slopes, softmax_scale, causal, window_left, window_right, softcap});
  params.plan.num_splits = static_cast<int>(num_splits);
  params.plan.split_keys = static_cast<int>(split_size);
  const AttentionPlan plan = plan_for(op, backend, params);
  Tensor out = allocate(q, q.sizes());
  Tensor lse = allocate(q, {params.num_heads_q, params.total_q}, ScalarType::Float);
  if (q.numel() == 0 || params.batch == 0) return {out, lse};
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  Workspace of_few;
  if (plan.min_queries > 0) {
    AttentionParams few = of_few_queries(params, plan);
    of_few = allocate_workspace(q, few);
    launch(op, launch_paged_attention, few, q);
  }
  params.plan = plan;
  const Workspace workspace = allocate_workspace(q, params);
  launch(op, launch_paged_attention, params, q);
  return {out, lse};
}

}  // namespace

LT_IMPL(m) { m.impl("paged_attention", TORCH_BOX(&paged_attention)); }

}  // namespace llamatelemetry
