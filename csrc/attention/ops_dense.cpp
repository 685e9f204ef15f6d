// Attention over dense keys, whole or packed sequences: checks, allocation and params, compiled
// once for each library.
#include <tuple>
#include <utility>

#include "attention/ops_checks.h"

namespace llamatelemetry {
namespace {

// Checks what both forms share and fills everything but the lengths, the plan and the results.
AttentionParams dense_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             int64_t batch, const ScoreOptions& options) {
  const DType dtype = check_floating(op, "q", q);
  const int64_t heads = q.dim() - 2;
  check_head_dim(op, q.size(heads + 1));
  check_heads(op, q.size(heads), k.size(heads));
  for (const auto& [arg, x] : {std::pair<const char*, const Tensor&>{"q", q}, {"k", k}, {"v", v}}) {
    check_like(op, arg, x, "q", q);
    check_last_contiguous(op, arg, x);
  }
  AttentionParams p{};
  p.q = heads_of(q);
  p.k = {.rows = heads_of(k), .page_size = 0, .scales = {}, .dtype = dtype};
  p.v = {.rows = heads_of(v), .page_size = 0, .scales = {}, .dtype = dtype};
  p.batch = batch;
  p.num_heads_q = q.size(heads);
  p.num_heads_kv = k.size(heads);
  p.group_size = p.num_heads_q / p.num_heads_kv;
  p.head_dim = q.size(heads + 1);
  p.dtype = dtype;
  set_scores(op, p, q, options);
  return p;
}

std::tuple<Tensor, Tensor> run(const char* op, AttentionParams& params, const Tensor& q, Tensor lse,
                               const std::optional<std::string>& backend) {
  params.plan = plan_for(op, backend, params);
  Tensor out = allocate(q, q.sizes());
  if (q.numel() == 0 || params.batch == 0 || params.seqlen_q == 0) return {out, lse};
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  const Workspace workspace = allocate_workspace(q, params);
  launch(op, launch_dense_attention, params, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor> flash_attn(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const std::optional<Tensor>& sinks,
                                      const std::optional<Tensor>& alibi_slopes,
                                      double softmax_scale, bool causal, int64_t window_left,
                                      int64_t window_right, double softcap,
                                      std::optional<StringHandle> backend_handle) {
  const auto backend = take_string(backend_handle);
  constexpr const char* op = "flash_attn";
  check_dim(op, "q", q, 4, "[batch, seqlen_q, num_heads_q, head_dim]");
  check_dim(op, "k", k, 4, "[batch, seqlen_k, num_heads_kv, head_dim]");
  const int64_t batch = q.size(0);
  for (const auto& [arg, x] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_shape(op, arg, x, "[batch, seqlen_k, num_heads_kv, head_dim] as q and k",
                {batch, k.size(1), k.size(2), q.size(3)});
  }
  const DeviceGuard guard(q);
  AttentionParams params = dense_params(
      op, q, k, v, batch,
      {sinks, alibi_slopes, softmax_scale, causal, window_left, window_right, softcap});
  params.seqlen_q = q.size(1);
  params.seqlen_k = k.size(1);
  params.total_q = batch * params.seqlen_q;
  params.total_k = batch * params.seqlen_k;
  Tensor lse = allocate(q, {batch, params.num_heads_q, params.seqlen_q}, ScalarType::Float);
  return run(op, params, q, lse, backend);
}

std::tuple<Tensor, Tensor> flash_attn_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                             int64_t max_seqlen_q, int64_t max_seqlen_k,
                                             const std::optional<Tensor>& sinks,
                                             const std::optional<Tensor>& alibi_slopes,
                                             double softmax_scale, bool causal, int64_t window_left,
                                             int64_t window_right, double softcap,
                                             std::optional<StringHandle> backend_handle) {
  const auto backend = take_string(backend_handle);
  constexpr const char* op = "flash_attn_varlen";
  check_dim(op, "q", q, 3, "[total_q, num_heads_q, head_dim]");
  check_dim(op, "k", k, 3, "[total_k, num_heads_kv, head_dim]");
  for (const auto& [arg, x] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_shape(op, arg, x, "[total_k, num_heads_kv, head_dim] as q and k",
                {k.size(0), k.size(1), q.size(2)});
  }
  check_dim(op, "cu_seqlens_q", cu_seqlens_q, 1, "[batch + 1]");
  check_at_least(op, "the size of cu_seqlens_q", cu_seqlens_q.size(0), 1);
  const int64_t batch = cu_seqlens_q.size(0) - 1;
  check_lengths(op, "cu_seqlens_q", cu_seqlens_q, "[batch + 1]", batch + 1, q);
  check_lengths(op, "cu_seqlens_k", cu_seqlens_k, "[batch + 1]", batch + 1, q);
  check_starts(op, "cu_seqlens_q", cu_seqlens_q, "q", q.size(0));
  check_starts(op, "cu_seqlens_k", cu_seqlens_k, "k", k.size(0));
  check_at_least(op, "max_seqlen_q", max_seqlen_q, 0);
  check_at_least(op, "max_seqlen_k", max_seqlen_k, 0);
  const DeviceGuard guard(q);
  AttentionParams params = dense_params(
      op, q, k, v, batch,
      {sinks, alibi_slopes, softmax_scale, causal, window_left, window_right, softcap});
  params.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
  params.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  params.seqlen_q = max_seqlen_q;
  params.seqlen_k = max_seqlen_k;
  params.total_q = q.size(0);
  params.total_k = k.size(0);
  Tensor lse = allocate(q, {params.num_heads_q, params.total_q}, ScalarType::Float);
  return run(op, params, q, lse, backend);
}

}  // namespace

LT_IMPL(m) {
  m.impl("flash_attn", TORCH_BOX(&flash_attn));
  m.impl("flash_attn_varlen", TORCH_BOX(&flash_attn_varlen));
}

}  // namespace llamatelemetry
