"""Typed wrappers of torch.ops.llamatelemetry, a module a room; reference/ is their semantics."""

from llamatelemetry.ops.attention import (
    flash_attn,
    flash_attn_varlen,
    merge_attn_states,
    paged_attention,
)
from llamatelemetry.ops.cache import (
    advance_step_,
    append_kv_,
    copy_blocks_,
    rope_append_kv_,
    slot_mapping,
    swap_blocks_,
)
from llamatelemetry.ops.cascade import cascade_attention
from llamatelemetry.ops.formats import QuantFormat
from llamatelemetry.ops.gemm import linear, quant_linear
from llamatelemetry.ops.gemm_products import (
    gemm,
    scaled_linear,
    tensor_core_gemm,
    tensor_core_gemm_int8,
)
from llamatelemetry.ops.norm import (
    activation,
    fused_add_rms_norm_,
    gelu_and_mul,
    gelu_tanh_and_mul,
    layer_norm,
    rms_norm,
    rotary_embedding_,
    silu_and_mul,
    softmax,
)
from llamatelemetry.ops.norm_quantize import (
    fused_add_rms_norm_quantize_,
    quantize_rows,
    rms_norm_quantize,
    silu_and_mul_quantize,
)
from llamatelemetry.ops.quant import dequantize, quant_embedding, repack, unpack
from llamatelemetry.ops.sampling import apply_token_bitmask_, sample

__all__ = [
    "QuantFormat",
    "activation",
    "advance_step_",
    "append_kv_",
    "apply_token_bitmask_",
    "cascade_attention",
    "copy_blocks_",
    "dequantize",
    "flash_attn",
    "flash_attn_varlen",
    "fused_add_rms_norm_",
    "fused_add_rms_norm_quantize_",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "gemm",
    "layer_norm",
    "linear",
    "merge_attn_states",
    "paged_attention",
    "quant_embedding",
    "quant_linear",
    "quantize_rows",
    "repack",
    "rms_norm",
    "rms_norm_quantize",
    "rope_append_kv_",
    "rotary_embedding_",
    "sample",
    "scaled_linear",
    "silu_and_mul",
    "silu_and_mul_quantize",
    "slot_mapping",
    "softmax",
    "swap_blocks_",
    "tensor_core_gemm",
    "tensor_core_gemm_int8",
    "unpack",
]
