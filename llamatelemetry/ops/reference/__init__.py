"""The semantics of every op in plain PyTorch: the tests' oracle, and what to read first.

Each function computes in the dtype it is given; tests pass float64.
"""

from llamatelemetry.ops.reference.attention import (
    flash_attn,
    flash_attn_varlen,
    merge_attn_states,
    paged_attention,
)
from llamatelemetry.ops.reference.cache import (
    advance_step_,
    append_kv_,
    copy_blocks_,
    rope_append_kv_,
    slot_mapping,
    swap_blocks_,
)
from llamatelemetry.ops.reference.gemm import (
    gemm,
    linear,
    quant_linear,
    rounded_activations,
    scaled_linear,
    tensor_core_gemm,
    tensor_core_gemm_int8,
)
from llamatelemetry.ops.reference.norm import (
    activation,
    fused_add_rms_norm_,
    fused_add_rms_norm_quantize_,
    gelu_and_mul,
    gelu_tanh_and_mul,
    layer_norm,
    quantize_rows,
    rms_norm,
    rms_norm_quantize,
    rotary_embedding_,
    silu_and_mul,
    silu_and_mul_quantize,
    softmax,
)
from llamatelemetry.ops.reference.quant import dequantize, quant_embedding, repack
from llamatelemetry.ops.reference.sampling import (
    apply_token_bitmask_,
    philox4x32,
    sample,
    sampling_probabilities,
)

__all__ = [
    "activation",
    "advance_step_",
    "append_kv_",
    "apply_token_bitmask_",
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
    "philox4x32",
    "quant_embedding",
    "quant_linear",
    "quantize_rows",
    "repack",
    "rms_norm",
    "rms_norm_quantize",
    "rope_append_kv_",
    "rotary_embedding_",
    "rounded_activations",
    "sample",
    "sampling_probabilities",
    "scaled_linear",
    "silu_and_mul",
    "silu_and_mul_quantize",
    "slot_mapping",
    "softmax",
    "swap_blocks_",
    "tensor_core_gemm",
    "tensor_core_gemm_int8",
]
