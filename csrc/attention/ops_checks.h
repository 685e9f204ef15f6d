// What ops_dense.cpp and ops_paged.cpp share: checks, views of tensors, and the question to
// choice.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>

#include "attention/params.h"
#include "binding/launch.h"
#include "common/device.h"

namespace llamatelemetry {

inline void check_at_least(const char* op, const char* arg, int64_t value, int64_t least) {
  check(value >= least, op, arg, "be at least " + std::to_string(least), std::to_string(value));
}

// A contiguous int32 vector beside q.
inline void check_lengths(const char* op, const char* arg, const Tensor& x, const char* meaning,
                          int64_t size, const Tensor& q) {
  check_shape(op, arg, x, meaning, {size});
  check_dtype(op, arg, x, ScalarType::Int);
  check_device(op, arg, x, "q", q);
  check_contiguous(op, arg, x);
}

// Where sequences begin among `total` tokens. Only on the CPU, where looking costs no wait: starts
// past the end would have it write there.
inline void check_starts(const char* op, const char* arg, const Tensor& starts, const char* of,
                         int64_t total) {
  if constexpr (kOnCuda) return;
  const int32_t* at = starts.const_data_ptr<int32_t>();
  int32_t before = 0;
  for (int64_t i = 0; i < starts.size(0); ++i) {
    check(at[i] >= before && at[i] <= total, op, arg,
          "rise from 0 to at most " + std::to_string(total) + ", the tokens of " + of,
          std::to_string(at[i]) + " at " + std::to_string(i));
    before = at[i];
  }
}

inline void check_head_dim(const char* op, int64_t head_dim) {
  check(head_dim % kHeadDimMultiple == 0 && head_dim > 0 && head_dim <= kMaxHeadDim, op, "head_dim",
        "be a multiple of " + std::to_string(kHeadDimMultiple) + " up to " +
            std::to_string(kMaxHeadDim),
        std::to_string(head_dim) + "; pad q, k and v with zeros");
}

inline void check_heads(const char* op, int64_t num_heads_q, int64_t num_heads_kv) {
  check(num_heads_kv > 0 && num_heads_q % num_heads_kv == 0, op, "num_heads_q",
        "be a multiple of num_heads_kv = " + std::to_string(num_heads_kv),
        std::to_string(num_heads_q));
}

// A side of a window that is wider than any sequence, so that positions can be added to it.
inline int64_t window_side(int64_t tokens) { return std::min(tokens, int64_t{1} << 40); }

inline void check_scores(const char* op, double softmax_scale, int64_t window_left,
                         int64_t window_right, double softcap) {
  check_at_least(op, "window_left", window_left, -1);
  check_at_least(op, "window_right", window_right, -1);
  check(std::isfinite(softmax_scale), op, "softmax_scale", "be finite",
        std::to_string(softmax_scale));
  // Past it the rounding of softcap * tanh(score / softcap) shows in the scores.
  constexpr int kMaxSoftcap = 10000;
  check(softcap >= 0 && softcap <= kMaxSoftcap, op, "softcap",
        "lie in [0, " + std::to_string(kMaxSoftcap) + "] (0: off)", std::to_string(softcap));
}

// What every op of attention is told about its scores.
struct ScoreOptions {
  const std::optional<Tensor>& sinks;
  const std::optional<Tensor>& alibi_slopes;
  double softmax_scale;
  bool causal;
  int64_t window_left;
  int64_t window_right;
  double softcap;
};

inline void check_score_tensor(const char* op, const char* arg, const Tensor& x, const Tensor& q) {
  check_dtype(op, arg, x, ScalarType::Float);
  check_device(op, arg, x, "q", q);
  check_contiguous(op, arg, x);
}

// Checks the options and sets what they say in p, whose batch and num_heads_q are known.
inline void set_scores(const char* op, AttentionParams& p, const Tensor& q,
                       const ScoreOptions& options) {
  check_scores(op, options.softmax_scale, options.window_left, options.window_right,
               options.softcap);
  if (options.sinks) {
    check_shape(op, "sinks", *options.sinks, "[num_heads_q]", {p.num_heads_q});
    check_score_tensor(op, "sinks", *options.sinks, q);
    p.sinks = options.sinks->const_data_ptr<float>();
  }
  if (options.alibi_slopes) {
    const Tensor& slopes = *options.alibi_slopes;
    const bool per_sequence = slopes.dim() == 2;
    if (per_sequence) {
      check_shape(op, "alibi_slopes", slopes, "[batch, num_heads_q]", {p.batch, p.num_heads_q});
    } else {
      check_shape(op, "alibi_slopes", slopes, "[num_heads_q]", {p.num_heads_q});
    }
    check_score_tensor(op, "alibi_slopes", slopes, q);
    p.alibi_slopes = slopes.const_data_ptr<float>();
    p.alibi_batch_stride = per_sequence ? p.num_heads_q : 0;
  }
  p.window_left = window_side(options.window_left);
  p.window_right = options.causal ? 0 : window_side(options.window_right);
  p.softmax_scale = static_cast<float>(options.softmax_scale);
  p.softcap = static_cast<float>(options.softcap);
}

inline Heads heads_of(const Tensor& x) {
  const bool packed = x.dim() == 3;
  return {.data = x.const_data_ptr(),
          .batch_stride = packed ? 0 : x.stride(0),
          .token_stride = x.stride(packed ? 0 : 1),
          .head_stride = x.stride(packed ? 1 : 2)};
}

// What of a descriptor is this library and the device at hand.
inline AttentionDescriptor this_machine() {
  AttentionDescriptor d{};
  d.on_cuda = kOnCuda;
#ifdef LT_CUDA
  d.capability = current_device().capability;
  d.code_capability = current_device().code_capability;
  d.max_shared_bytes = current_device().max_shared_bytes;
  d.num_sms = current_device().num_sms;
#else
  d.num_threads = num_threads();
#endif
#ifdef LT_SM90
  d.has_sm90_code = true;
#endif
  return d;
}

// Whether the rows of x lie apart, each at a multiple of 16 bytes.
inline bool has_aligned_rows(const Heads& x, int64_t batch, int64_t num_tokens, int64_t num_heads,
                             DType dtype) {
  const bool apart = num_tokens <= 1 || x.token_stride != 0;
  return apart && rows_are_aligned(x, batch, num_tokens, num_heads, dtype_bytes(dtype));
}

// Bytes from the first row of keys or values to the last that a kernel counts from there: those of
// all pages, or of a sequence.
inline int64_t reach_of(const KeyValueView& view, int64_t num_pages, int64_t num_tokens) {
  const int64_t pages = view.page_size > 0 ? std::max<int64_t>(num_pages - 1, 0) : 0;
  return (pages * view.rows.batch_stride + num_tokens * view.rows.token_stride) *
         dtype_bytes(view.dtype);
}

inline AttentionDescriptor descriptor_of(const AttentionParams& p) {
  AttentionDescriptor d = this_machine();
  d.dtype = p.dtype;
  d.kv_dtype = p.k.dtype;
  d.is_packed = p.cu_seqlens_q != nullptr;
  d.page_size = p.k.page_size;
  d.head_dim = p.head_dim;
  d.batch = p.batch;
  d.num_heads_q = p.num_heads_q;
  d.num_heads_kv = p.num_heads_kv;
  d.seqlen_q = p.seqlen_q;
  d.seqlen_k = p.seqlen_k;
  d.total_q = p.total_q;
  d.total_k = p.total_k;
  d.has_score_terms = has_score_terms(p);
  d.num_splits = p.plan.num_splits;
  d.split_keys = p.plan.split_keys;
  const bool paged = d.page_size > 0;
  const int64_t parts_k = paged ? p.num_pages : p.batch;
  const int64_t tokens_q = d.is_packed ? p.total_q : p.seqlen_q;
  const int64_t tokens_k = paged ? d.page_size : d.is_packed ? p.total_k : p.seqlen_k;
  d.aligned = has_aligned_rows(p.q, p.batch, tokens_q, p.num_heads_q, p.dtype) &&
              has_aligned_rows(p.k.rows, parts_k, tokens_k, p.num_heads_kv, p.k.dtype) &&
              has_aligned_rows(p.v.rows, parts_k, tokens_k, p.num_heads_kv, p.v.dtype);
  constexpr int64_t kFar = int64_t{1} << 36;
  const int64_t tokens = paged ? d.page_size : p.seqlen_k;
  d.far_apart =
      std::max(reach_of(p.k, p.num_pages, tokens), reach_of(p.v, p.num_pages, tokens)) >= kFar;
  return d;
}

inline AttentionImpl impl_of_name(const char* op, const std::string& name) {
  std::string names;
  for (const NamedImpl& named : kNamedImpls) {
    if (name == named.name) return named.impl;
    names += (names.empty() ? "" : ", ") + std::string(named.name);
  }
  check(false, op, "backend", "be None or one of " + names, "\"" + name + "\"");
  return AttentionImpl::kNone;
}

// The plan for these params: of the implementation that backend names, or of the best. p.plan holds
// the splits that the caller asked for.
inline AttentionPlan plan_for(const char* op, const std::optional<std::string>& backend,
                              const AttentionParams& p) {
  AttentionDescriptor d = descriptor_of(p);
  if (backend) {
    const AttentionImpl wanted = impl_of_name(op, *backend);
    const char* reason = why_not(wanted, d);
    check(reason == nullptr, op, "backend", "serve the call",
          *backend + ": " + (reason ? reason : "") +
              "; leave backend=None to choose the best that does");
    if (decodes(wanted)) d.min_queries = min_queries_of(wanted, d);
    return plan_of(wanted, d);
  }
  const AttentionImpl best = best_impl(d);
  if (best == AttentionImpl::kNone && d.dtype == DType::kBFloat16 && d.code_capability < 80) {
    check(false, op, "q",
          "be float16 or float32 on a GPU of compute capability " +
              std::to_string(d.capability / 10) + "." + std::to_string(d.capability % 10),
          "bfloat16; call .half()");
  }
  if (best == AttentionImpl::kNone) {
    std::string reasons;
    for (const NamedImpl& named : kNamedImpls) {
      const char* reason = why_not(named.impl, d);
      reasons += std::string("; ") + named.name + ": " + (reason ? reason : "");
    }
    check(false, op, "the call", "suit an implementation", "one that none serves" + reasons);
  }
  d.min_queries = min_queries_of(best, d);
  return plan_of(best, d);
}

// Of a call some of whose sequences have too few queries for its plan: the same call for those, its
// plan included. p.plan holds the splits that the caller asked for.
inline AttentionParams of_few_queries(AttentionParams p, const AttentionPlan& plan) {
  p.seqlen_q = plan.min_queries - 1;
  AttentionDescriptor d = descriptor_of(p);
  d.max_queries = p.seqlen_q;
  p.plan = plan_of(impl_of_few(plan.impl), d);
  return p;
}

// What a launch needs beside its tensors, kept until it is launched: torch's allocator hands the
// memory on in stream order.
struct Workspace {
  std::optional<Tensor> partials;
  std::optional<Tensor> stats;
  std::optional<Tensor> flags;
  std::optional<Tensor> counter;
};

// A number that no other launch of this process carries, and hardly any memory holds by chance
// (splitmix64, a bijection of a counter).
inline uint64_t fresh_launch_number() {
  static std::atomic<uint64_t> count{0};
  uint64_t x = (count.fetch_add(1, std::memory_order_relaxed) + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

inline Workspace allocate_workspace(const Tensor& q, AttentionParams& p) {
  const AttentionPlan& plan = p.plan;
  Workspace workspace;
  const auto allocate_partials = [&](int64_t rows, int64_t columns) {
    workspace.partials = allocate(q, {rows, columns + 2}, ScalarType::Float);
    float* const partials = workspace.partials->mutable_data_ptr<float>();
    p.partial_out = partials;
    p.partial_stats = partials + rows * columns;
  };
  if (plan.num_splits > 1 && plan.impl == AttentionImpl::kSm90) {
    const int64_t rows = plan.num_splits * p.total_q * p.num_heads_q;
    workspace.partials = allocate(q, {rows, p.head_dim}, ScalarType::Float);
    workspace.stats = allocate(q, {rows}, ScalarType::Float);
    p.partial_out = workspace.partials->mutable_data_ptr<float>();
    p.partial_stats = workspace.stats->mutable_data_ptr<float>();
  } else if (plan.num_splits > 1) {
    p.part_tokens =
        plan.max_queries > 0 ? std::min(p.total_q, p.batch * plan.max_queries) : p.total_q;
    allocate_partials(plan.num_splits * p.part_tokens * p.num_heads_q, p.head_dim);
  }
  if (plan.num_blocks > 0 && plan.cluster_blocks == 0) {
    if (!plan.fixed_splits) {  // each leaves at most one part
      const decode::Config& config = decode_config(plan.impl, p.head_dim, p.k.dtype, plan.is_wide);
      allocate_partials(int64_t{plan.num_blocks} * config.row_tile, config.head_dim);
    }
    workspace.flags = allocate(q, {plan.num_blocks}, ScalarType::Long);
    p.part_flags = reinterpret_cast<uint64_t*>(workspace.flags->mutable_data_ptr());
    p.launch_number = fresh_launch_number();
  }
  if (plan.impl == AttentionImpl::kSm90) {
    const bool is_shared = plan.min_queries > 0;
    workspace.counter = allocate(q, {is_shared ? 2 + p.batch : 1}, ScalarType::Int);
    p.tile_counter = workspace.counter->mutable_data_ptr<int32_t>();
    if (is_shared) p.served = p.tile_counter + 1;
  }
  return workspace;
}

}  // namespace llamatelemetry
