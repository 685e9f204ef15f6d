// rope_append_kv_: checks and Params, compiled once for each library.
#include <utility>

#include "binding/launch.h"
#include "cache/ops_checks.h"

namespace llamatelemetry {
namespace {

struct RopeTensors {
  const Tensor& cos;
  const Tensor& sin;
  const std::optional<Tensor>& positions;
};

void check_rope(const char* op, const RopeTensors& t, const Tensor& qkv) {
  const int64_t num_tokens = qkv.size(0);
  const int64_t head_dim = qkv.size(2);
  check_dim(op, "cos", t.cos, 2, "[positions, rotary_dim]");
  check(t.cos.size(1) % 2 == 0 && t.cos.size(1) <= head_dim, op, "cos",
        "have an even rotary_dim <= head_dim = " + std::to_string(head_dim),
        std::to_string(t.cos.size(1)));
  check_shape(op, "sin", t.sin, "the shape of cos", {t.cos.size(0), t.cos.size(1)});
  for (const auto& [arg, x] :
       {std::pair<const char*, const Tensor&>{"cos", t.cos}, {"sin", t.sin}}) {
    check_like(op, arg, x, "qkv", qkv);
    check_last_contiguous(op, arg, x);
  }
  if (!t.positions) {
    check(t.cos.size(0) >= num_tokens, op, "cos",
          "have a row for each of the " + std::to_string(num_tokens) + " tokens",
          std::to_string(t.cos.size(0)) + " rows; or pass positions");
    return;
  }
  const ScalarType type = t.positions->scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, op, "positions", "be int64 or int32",
        dtype_text(type));
  check_shape(op, "positions", *t.positions, "[num_tokens]", {num_tokens});
  check_device(op, "positions", *t.positions, "qkv", qkv);
  check_contiguous(op, "positions", *t.positions);
}

void check_qkv(const char* op, const Tensor& qkv, const Tensor& k_cache) {
  check_dim(op, "qkv", qkv, 3, "[num_tokens, num_heads_q + 2 * num_heads_kv, head_dim]");
  const int64_t num_heads_kv = k_cache.size(2);
  check(qkv.size(1) >= 2 * num_heads_kv, op, "qkv",
        "have at least the 2 * " + std::to_string(num_heads_kv) + " heads of k and v",
        std::to_string(qkv.size(1)));
  check(qkv.size(2) == k_cache.size(3), op, "qkv",
        "have the head_dim of k_cache = " + std::to_string(k_cache.size(3)),
        std::to_string(qkv.size(2)));
  check(qkv.size(2) <= kMaxRopeHeadDim, op, "head_dim",
        "be at most " + std::to_string(kMaxRopeHeadDim), std::to_string(qkv.size(2)));
  check_written_to(op, "qkv", qkv, k_cache);
  check_last_contiguous(op, "qkv", qkv);
  check_apart(op, "qkv", qkv.size(0), qkv.stride(0), qkv.size(2));
  check_apart(op, "qkv", qkv.size(1), qkv.stride(1), qkv.size(2));
}

void rope_append_kv_(Tensor qkv, const Tensor& cos, const Tensor& sin,
                     std::optional<Tensor> positions, bool interleaved, Tensor k_cache,
                     Tensor v_cache, const Tensor& slot_mapping, std::optional<Tensor> q_weight,
                     std::optional<Tensor> k_weight, double eps, double weight_offset,
                     std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
  constexpr const char* op = "rope_append_kv_";
  check_caches(op, k_cache, v_cache);
  check_cache_scales(op, k_cache, k_scales, v_scales);
  check_scales_apart(op, k_scales, v_scales);
  check_qkv(op, qkv, k_cache);
  check_rope(op, {cos, sin, positions}, qkv);
  check_slots(op, slot_mapping, qkv.size(0), k_cache);
  const auto norm_weight = [&](const char* arg, const std::optional<Tensor>& weight) {
    return checked_vector(op, arg, weight, "[head_dim]", qkv.size(2), "qkv", qkv);
  };
  const void* q_norm = norm_weight("q_weight", q_weight);
  const void* k_norm = norm_weight("k_weight", k_weight);
  const DeviceGuard guard(qkv);
  if (qkv.numel() == 0) return;
  const int64_t num_heads_kv = k_cache.size(2);
  const RopeAppendKvParams params{
      .qkv = qkv.mutable_data_ptr(),
      .token_stride = qkv.stride(0),
      .head_stride = qkv.stride(1),
      .cos = cos.const_data_ptr(),
      .sin = sin.const_data_ptr(),
      .cos_row_stride = cos.stride(0),
      .sin_row_stride = sin.stride(0),
      .positions = positions ? positions->const_data_ptr() : nullptr,
      .positions_are_int64 = positions && positions->scalar_type() == ScalarType::Long,
      .interleaved = interleaved,
      .q_weight = q_norm,
      .k_weight = k_norm,
      .eps = static_cast<float>(eps),
      .weight_offset = static_cast<float>(weight_offset),
      .planes = {plane_of(k_cache), plane_of(v_cache)},
      .slot_mapping = slot_mapping.const_data_ptr<int64_t>(),
      .num_tokens = qkv.size(0),
      .num_positions = cos.size(0),
      .num_blocks = k_cache.size(0),
      .page_size = k_cache.size(1),
      .num_heads_q = qkv.size(1) - 2 * num_heads_kv,
      .num_heads_kv = num_heads_kv,
      .head_dim = qkv.size(2),
      .rotary_dim = cos.size(1),
      .scales = {cache_scales_of(k_scales), cache_scales_of(v_scales)},
      .dtype = *dtype_of(qkv.scalar_type()),
      .stored = *dtype_of(k_cache.scalar_type()),
  };
  launch(op, launch_rope_append_kv, params, qkv);
}

}  // namespace

LT_IMPL(m) { m.impl("rope_append_kv_", TORCH_BOX(&rope_append_kv_)); }

}  // namespace llamatelemetry
