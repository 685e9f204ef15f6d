// merge_attn_states: checks, allocation and params, compiled once for each library.
#include <tuple>
#include <utility>

#include "attention/merge_params.h"
#include "binding/launch.h"

namespace llamatelemetry {
namespace {

std::tuple<Tensor, Tensor> merge_attn_states(const Tensor& out_a, const Tensor& lse_a,
                                             const Tensor& out_b, const Tensor& lse_b) {
  constexpr const char* op = "merge_attn_states";
  const DType dtype = check_floating(op, "out_a", out_a);
  check_dim(op, "out_a", out_a, 3, "[num_tokens, num_heads, head_dim]");
  const int64_t num_tokens = out_a.size(0);
  const int64_t num_heads = out_a.size(1);
  const int64_t head_dim = out_a.size(2);
  check_shape(op, "out_b", out_b, "the shape of out_a", {num_tokens, num_heads, head_dim});
  check_like(op, "out_b", out_b, "out_a", out_a);
  for (const auto& [arg, x] :
       {std::pair<const char*, const Tensor&>{"out_a", out_a}, {"out_b", out_b}}) {
    check_contiguous(op, arg, x);
  }
  for (const auto& [arg, x] :
       {std::pair<const char*, const Tensor&>{"lse_a", lse_a}, {"lse_b", lse_b}}) {
    check_shape(op, arg, x, "[num_heads, num_tokens]", {num_heads, num_tokens});
    check_dtype(op, arg, x, ScalarType::Float);
    check_device(op, arg, x, "out_a", out_a);
    check_contiguous(op, arg, x);
  }
  const DeviceGuard guard(out_a);
  Tensor out = allocate(out_a, out_a.sizes());
  Tensor lse = allocate(lse_a, lse_a.sizes());
  if (num_tokens * num_heads == 0) return {out, lse};
  const MergeStatesParams params{
      .out_a = out_a.const_data_ptr(),
      .lse_a = lse_a.const_data_ptr<float>(),
      .out_b = out_b.const_data_ptr(),
      .lse_b = lse_b.const_data_ptr<float>(),
      .out = out.mutable_data_ptr(),
      .lse = lse.mutable_data_ptr<float>(),
      .num_tokens = num_tokens,
      .num_heads = num_heads,
      .head_dim = head_dim,
      .dtype = dtype,
  };
  launch(op, launch_merge_attn_states, params, out_a);
  return {out, lse};
}

}  // namespace

LT_IMPL(m) { m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states)); }

}  // namespace llamatelemetry
