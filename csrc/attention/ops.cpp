// Attention: checks, allocation and Params, compiled once for each library.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "attention/params.h"
#include "binding/launch.h"
#include "common/device.h"

namespace llamatelemetry {
namespace {

// Up to so many queries paged_attention on the CPU cuts the keys of a sequence into parts.
constexpr int kFewQueries = 16;

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

void check_head_dim(const char* op, int64_t head_dim) {
  check(head_dim % kHeadDimMultiple == 0 && head_dim > 0 && head_dim <= kMaxHeadDim, op, "head_dim",
        "be a multiple of " + std::to_string(kHeadDimMultiple) + " up to " +
            std::to_string(kMaxHeadDim),
        std::to_string(head_dim) + "; pad q, k and v with zeros");
}

void check_heads(const char* op, int64_t num_heads_q, int64_t num_heads_kv) {
  check(num_heads_kv > 0 && num_heads_q % num_heads_kv == 0, op, "num_heads_q",
        "be a multiple of num_heads_kv = " + std::to_string(num_heads_kv),
        std::to_string(num_heads_q));
  check(num_heads_q <= 65535, op, "num_heads_q", "be at most 65535, as a grid has no more rows",
        std::to_string(num_heads_q));
}

void check_scores(const char* op, double softmax_scale, int64_t window_left, int64_t window_right,
                  double softcap) {
  check_at_least(op, "window_left", window_left, -1);
  check_at_least(op, "window_right", window_right, -1);
  check(std::isfinite(softmax_scale), op, "softmax_scale", "be finite",
        std::to_string(softmax_scale));
  // Past it the rounding of softcap * tanh(score / softcap) shows in the scores.
  constexpr double kMaxSoftcap = 10000;
  check(softcap >= 0 && softcap <= kMaxSoftcap, op, "softcap", "lie in [0, 10000] (0: off)",
        std::to_string(softcap));
}

// Into how many parts the keys of a sequence are cut, so that few queries over many keys use every
// thread. A function of shapes only, and not of the batch: a result does not depend on neighbours.
int64_t num_splits_of([[maybe_unused]] int64_t max_seqlen_q, [[maybe_unused]] int64_t capacity) {
#ifdef LT_CUDA
  return 1;
#else
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
  check_head_dim(op, head_dim);

  check_dim(op, "k_cache", k_cache, 4, "[num_blocks, page_size, num_heads_kv, head_dim]");
  const int64_t page_size = k_cache.size(1);
  const int64_t num_heads_kv = k_cache.size(2);
  check_at_least(op, "page_size", page_size, 1);
  check_heads(op, num_heads_q, num_heads_kv);
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
  check_scores(op, softmax_scale, window_left, window_right, softcap);

  const DeviceGuard guard(q);
  Tensor out = allocate(q, q.sizes());
  Tensor lse = allocate(q, {num_heads_q, total_q}, ScalarType::Float);
  if (q.numel() == 0 || batch == 0) return {out, lse};
  const int64_t num_splits = num_splits_of(max_seqlen_q, block_table.size(1) * page_size);
  const int64_t num_partials = num_splits > 1 ? num_splits * total_q * num_heads_q : 0;
  Tensor partials = allocate(q, {num_partials, head_dim + 2}, ScalarType::Float);
  std::optional<Tensor> counter;
  if (kOnCuda && max_seqlen_q >= kManyQueries) counter = allocate(q, {1}, ScalarType::Int);
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
      .tile_counter = counter ? counter->mutable_data_ptr<int32_t>() : nullptr,
      .num_splits = num_splits,
      .total_q = total_q,
      .batch = batch,
      .max_seqlen_q = max_seqlen_q,
      .num_heads_kv = num_heads_kv,
      .group_size = num_heads_q / num_heads_kv,
      .head_dim = head_dim,
      .num_blocks = k_cache.size(0),
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

Heads heads_of(const Tensor& x) {
  const bool packed = x.dim() == 3;
  return {.data = x.const_data_ptr(),
          .batch_stride = packed ? 0 : x.stride(0),
          .token_stride = x.stride(packed ? 0 : 1),
          .head_stride = x.stride(packed ? 1 : 2)};
}

// Whether the rows of x lie apart, each at a multiple of 16 bytes.
bool has_aligned_rows(const Tensor& x) {
  const int64_t tokens = x.dim() - 3;
  const bool apart = x.size(tokens) <= 1 || x.stride(tokens) != 0;
  const int64_t element_bytes = x.scalar_type() == ScalarType::Float ? 4 : 2;
  return apart && rows_are_aligned(heads_of(x), x.size(0), x.size(tokens), x.size(tokens + 1),
                                   element_bytes);
}

// Aligned tensors of a dtype on the device that this library is for.
FlashDescriptor flash_on_this_device(DType dtype) {
  FlashDescriptor call{};
  call.on_cuda = kOnCuda;
  call.dtype = dtype;
  call.aligned = true;
#ifdef LT_CUDA
  call.capability = current_device().capability;
  call.code_capability = current_device().code_capability;
#endif
#ifdef LT_SM90
  call.has_sm90_code = true;
#endif
  return call;
}

// The implementation for these tensors: the one that backend names, or the best that serves them.
FlashImpl flash_impl_for(const char* op, int64_t backend, DType dtype, const Tensor& q,
                         const Tensor& k, const Tensor& v) {
  FlashDescriptor call = flash_on_this_device(dtype);
  call.aligned = has_aligned_rows(q) && has_aligned_rows(k) && has_aligned_rows(v);
  check(backend >= 0 && backend < kNumFlashImpls, op, "backend", "be an implementation's number",
        std::to_string(backend));
  if (const auto wanted = static_cast<FlashImpl>(backend); wanted != FlashImpl::kAuto) {
    const char* reason = why_not(wanted, call);
    check(reason == nullptr, op, "backend", "serve the call",
          std::string(flash_impl_name(wanted)) + ": " + (reason ? reason : "") +
              "; leave backend=None to choose the best that does");
    return wanted;
  }
  const FlashImpl best = choose_flash(call);
  check(best != FlashImpl::kAuto, op, "q",
        "be float16 or float32 on a GPU of compute capability " +
            std::to_string(call.capability / 10) + "." + std::to_string(call.capability % 10),
        std::string(dtype_text(q.scalar_type())) + "; call .half()");
  return best;
}

// The options that flash_attn and flash_attn_varlen share, in the order of the schema.
struct FlashOptions {
  const std::optional<Tensor>& sinks;
  const std::optional<Tensor>& alibi_slopes;
  double softmax_scale;
  bool causal;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  int64_t backend;
};

// Checks what both forms share and fills everything but the lengths.
FlashAttnParams flash_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             int64_t batch, const FlashOptions& options) {
  const DType dtype = check_floating(op, "q", q);
  const int64_t heads = q.dim() - 2;
  const int64_t num_heads_q = q.size(heads);
  const int64_t num_heads_kv = k.size(heads);
  const int64_t head_dim = q.size(heads + 1);
  check_head_dim(op, head_dim);
  check_heads(op, num_heads_q, num_heads_kv);
  for (const auto& [arg, x] : {std::pair<const char*, const Tensor&>{"q", q}, {"k", k}, {"v", v}}) {
    check_like(op, arg, x, "q", q);
    check_last_contiguous(op, arg, x);
  }
  check_scores(op, options.softmax_scale, options.window_left, options.window_right,
               options.softcap);
  if (options.sinks) {
    check_shape(op, "sinks", *options.sinks, "[num_heads_q]", {num_heads_q});
    check_dtype(op, "sinks", *options.sinks, ScalarType::Float);
    check_device(op, "sinks", *options.sinks, "q", q);
    check_contiguous(op, "sinks", *options.sinks);
  }
  bool slopes_per_sequence = false;
  if (options.alibi_slopes) {
    const Tensor& slopes = *options.alibi_slopes;
    slopes_per_sequence = slopes.dim() == 2;
    if (slopes_per_sequence) {
      check_shape(op, "alibi_slopes", slopes, "[batch, num_heads_q]", {batch, num_heads_q});
    } else {
      check_shape(op, "alibi_slopes", slopes, "[num_heads_q]", {num_heads_q});
    }
    check_dtype(op, "alibi_slopes", slopes, ScalarType::Float);
    check_device(op, "alibi_slopes", slopes, "q", q);
    check_contiguous(op, "alibi_slopes", slopes);
  }
  return {
      .q = heads_of(q),
      .k = heads_of(k),
      .v = heads_of(v),
      .cu_seqlens_q = nullptr,
      .cu_seqlens_k = nullptr,
      .block_table = nullptr,
      .cache_seqlens = nullptr,
      .sinks = options.sinks ? options.sinks->const_data_ptr<float>() : nullptr,
      .alibi_slopes =
          options.alibi_slopes ? options.alibi_slopes->const_data_ptr<float>() : nullptr,
      .out = nullptr,
      .lse = nullptr,
      .tile_counter = nullptr,
      .block_table_stride = 0,
      .page_size = 0,
      .num_blocks = 0,
      .alibi_batch_stride = slopes_per_sequence ? num_heads_q : 0,
      .batch = batch,
      .seqlen_q = 0,
      .seqlen_k = 0,
      .total_q = 0,
      .total_k = 0,
      .num_heads_q = num_heads_q,
      .num_heads_kv = num_heads_kv,
      .head_dim = head_dim,
      .window_left = options.window_left,
      .window_right = options.causal ? 0 : options.window_right,
      .softmax_scale = static_cast<float>(options.softmax_scale),
      .softcap = static_cast<float>(options.softcap),
      .dtype = dtype,
      .impl = flash_impl_for(op, options.backend, dtype, q, k, v),
  };
}

std::tuple<Tensor, Tensor> run_flash(const char* op, FlashAttnParams& params, const Tensor& q,
                                     Tensor lse) {
  Tensor out = allocate(q, q.sizes());
  if (q.numel() == 0 || params.batch == 0 || params.seqlen_q == 0) return {out, lse};
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  std::optional<Tensor> counter;
  if (params.impl == FlashImpl::kSm90) counter = allocate(q, {1}, ScalarType::Int);
  if (counter) params.tile_counter = counter->mutable_data_ptr<int32_t>();
  launch(op, launch_flash_attn, params, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor> flash_attn(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const std::optional<Tensor>& sinks,
                                      const std::optional<Tensor>& alibi_slopes,
                                      double softmax_scale, bool causal, int64_t window_left,
                                      int64_t window_right, double softcap, int64_t backend) {
  constexpr const char* op = "flash_attn";
  check_dim(op, "q", q, 4, "[batch, seqlen_q, num_heads_q, head_dim]");
  check_dim(op, "k", k, 4, "[batch, seqlen_k, num_heads_kv, head_dim]");
  const int64_t batch = q.size(0);
  for (const auto& [arg, x] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_shape(op, arg, x, "[batch, seqlen_k, num_heads_kv, head_dim] as q and k",
                {batch, k.size(1), k.size(2), q.size(3)});
  }
  const DeviceGuard guard(q);
  FlashAttnParams params = flash_params(
      op, q, k, v, batch,
      {sinks, alibi_slopes, softmax_scale, causal, window_left, window_right, softcap, backend});
  params.seqlen_q = q.size(1);
  params.seqlen_k = k.size(1);
  params.total_q = batch * params.seqlen_q;
  params.total_k = batch * params.seqlen_k;
  Tensor lse = allocate(q, {batch, params.num_heads_q, params.seqlen_q}, ScalarType::Float);
  return run_flash(op, params, q, lse);
}

std::tuple<Tensor, Tensor> flash_attn_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                             int64_t max_seqlen_q, int64_t max_seqlen_k,
                                             const std::optional<Tensor>& sinks,
                                             const std::optional<Tensor>& alibi_slopes,
                                             double softmax_scale, bool causal, int64_t window_left,
                                             int64_t window_right, double softcap,
                                             int64_t backend) {
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
  check_at_least(op, "max_seqlen_q", max_seqlen_q, 0);
  check_at_least(op, "max_seqlen_k", max_seqlen_k, 0);
  const DeviceGuard guard(q);
  FlashAttnParams params = flash_params(
      op, q, k, v, batch,
      {sinks, alibi_slopes, softmax_scale, causal, window_left, window_right, softcap, backend});
  params.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
  params.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  params.seqlen_q = max_seqlen_q;
  params.seqlen_k = max_seqlen_k;
  params.total_q = q.size(0);
  params.total_k = k.size(0);
  Tensor lse = allocate(q, {params.num_heads_q, params.total_q}, ScalarType::Float);
  return run_flash(op, params, q, lse);
}

}  // namespace

LT_IMPL(m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("flash_attn", TORCH_BOX(&flash_attn));
  m.impl("flash_attn_varlen", TORCH_BOX(&flash_attn_varlen));
}

}  // namespace llamatelemetry

// The C interface that llamatelemetry/ops/_flash_backends.py calls. nullptr past the last.
LT_EXPORT const char* lt_flash_impl_name(int impl) {
  using namespace llamatelemetry;
  return impl < kNumFlashImpls ? flash_impl_name(static_cast<FlashImpl>(impl)) : nullptr;
}

// Why one cannot serve aligned tensors of a DType on this library's current device, or nullptr.
LT_EXPORT const char* lt_flash_why_not(int impl, int dtype) {
  using namespace llamatelemetry;
  return why_not(static_cast<FlashImpl>(impl), flash_on_this_device(static_cast<DType>(dtype)));
}

// The implementation that is chosen for such tensors, "auto" where none serves them.
LT_EXPORT const char* lt_flash_choice(int dtype) {
  using namespace llamatelemetry;
  return flash_impl_name(choose_flash(flash_on_this_device(static_cast<DType>(dtype))));
}

#ifndef LT_CUDA
// Where llamatelemetry/models/attention.py prefers paged_attention.
LT_EXPORT int lt_few_queries() { return llamatelemetry::kFewQueries; }
#endif
