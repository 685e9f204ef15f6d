// Every op of the package, grouped by the room that holds it. Tensor(a!) is written in place.
#include "binding/stable.h"

// clang-format off: one op a line
STABLE_TORCH_LIBRARY(llamatelemetry, m) {
  // norm: x [..., size]; q, k [num_tokens, heads, head_dim]; cos, sin [positions, rotary_dim]
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0.0) -> Tensor");
  m.def("fused_add_rms_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, float weight_offset=0.0) -> ()");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset=0.0) -> Tensor");
  m.def("rotary_embedding_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved) -> ()");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def("gelu_and_mul(Tensor x) -> Tensor");
  m.def("gelu_tanh_and_mul(Tensor x) -> Tensor");
  m.def("activation(Tensor x, str kind) -> Tensor");
  m.def("softmax(Tensor x, float temperature) -> Tensor");

  // norm: rows of a byte a value, int8 or float8_e4m3fn, and a scale a row
  m.def("quantize_rows(Tensor x, ScalarType dtype, int? block=None) -> (Tensor, Tensor)");
  m.def("rms_norm_quantize(Tensor x, Tensor weight, ScalarType dtype, float eps, float weight_offset=0.0, int? block=None) -> (Tensor, Tensor)");
  m.def("fused_add_rms_norm_quantize_(Tensor x, Tensor(a!) residual, Tensor weight, ScalarType dtype, float eps, float weight_offset=0.0, int? block=None) -> (Tensor, Tensor)");
  m.def("silu_and_mul_quantize(Tensor x, ScalarType dtype, int? block=None) -> (Tensor, Tensor)");

  // cache: k_cache, v_cache [num_blocks, page_size, num_heads_kv, head_dim]
  m.def("append_kv_(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()");
  m.def("rope_append_kv_(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor slot_mapping, Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-6, float weight_offset=0.0, Tensor(d!)? k_scales=None, Tensor(e!)? v_scales=None) -> ()");
  m.def("copy_blocks_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_pairs) -> ()");
  m.def("swap_blocks_(Tensor k_from, Tensor v_from, Tensor(a!) k_to, Tensor(b!) v_to, Tensor block_pairs) -> ()");
  m.def("slot_mapping(Tensor positions, Tensor block_table, Tensor cu_seqlens_q, int page_size) -> Tensor");
  m.def("advance_step_(Tensor(a!) input_ids, Tensor(b!) positions, Tensor(c!) slot_mapping, Tensor(d!) cache_seqlens, Tensor(e!) offsets, Tensor next_ids, Tensor active, Tensor block_table, int page_size) -> ()");

  // attention: packed is [total_tokens, heads, head_dim], else [batch, seqlen, heads, head_dim]; returns out, lse; backend: a name of attention/choice.h
  m.def("flash_attn(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi_slopes, float softmax_scale, bool causal, int window_left, int window_right, float softcap, str? backend=None) -> (Tensor, Tensor)");
  m.def("flash_attn_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, Tensor? sinks, Tensor? alibi_slopes, float softmax_scale, bool causal, int window_left, int window_right, float softcap, str? backend=None) -> (Tensor, Tensor)");
  m.def("paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cache_seqlens, Tensor cu_seqlens_q, int max_seqlen_q, float softmax_scale, bool causal, int window_left, int window_right, float softcap, str? backend=None, Tensor? sinks=None, Tensor? alibi_slopes=None, int num_splits=0, int split_size=0, Tensor? k_scales=None, Tensor? v_scales=None) -> (Tensor, Tensor)");
  m.def("merge_attn_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)");

  // quant: format is a name of format/format.h; packed is what repack returns
  m.def("dequantize(Tensor data, str format, ScalarType dtype, Tensor? scales=None, Tensor? zeros=None, Tensor? perm=None) -> Tensor");
  m.def("repack(Tensor data, str format, str layout=\"rows16\") -> Tensor");
  m.def("unpack(Tensor packed, str format, int n, int k, str layout=\"rows16\") -> Tensor");
  m.def("quant_embedding(Tensor ids, Tensor packed, str format, int n, int k, ScalarType dtype, Tensor? scales=None, Tensor? zeros=None, Tensor? perm=None) -> Tensor");

  // gemm: x [..., k], weight [n, k], packed holds [n, k]; activation: a name of common/activation.h, as kind is
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, str? activation=None) -> Tensor");
  m.def("quant_linear(Tensor x, Tensor packed, str format, int n, Tensor? bias=None, bool exact=False, Tensor? scales=None, Tensor? zeros=None, Tensor? perm=None, str? activation=None) -> Tensor");

  // gemm: alpha * a . b + beta * c of [m, k] and [k, n] or batches of them; backend: a name of gemm/product/choice.h
  m.def("gemm(Tensor a, Tensor b, float alpha=1.0, float beta=0.0, bool trans_a=False, bool trans_b=False, Tensor? c=None, str? backend=None) -> Tensor");
  m.def("tensor_core_gemm(Tensor a, Tensor b, float alpha=1.0, float beta=0.0, bool trans_a=False, bool trans_b=False, Tensor? c=None, str? backend=None) -> Tensor");
  m.def("tensor_core_gemm_int8(Tensor a, Tensor b, bool trans_a=False, bool trans_b=False, str? backend=None) -> Tensor");
  m.def("scaled_linear(Tensor x, Tensor x_scales, Tensor weight, Tensor weight_scales, ScalarType dtype, Tensor? bias=None, int? block=None) -> Tensor");

  // sampling: a parameter per row
  m.def("sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor offset) -> Tensor");
  m.def("apply_token_bitmask_(Tensor(a!) logits, Tensor bitmask) -> ()");
}
