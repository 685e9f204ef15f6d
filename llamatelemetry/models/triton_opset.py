"""The ops in Triton as an OpSet; importing this needs Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llamatelemetry.models.opset import GATED, OpSet
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.rows import QuantisedRows, Quantising
from llamatelemetry.quantization.w8a8 import W8A8Linear
from llamatelemetry.triton_ops import (  # noqa: F401 (ops)
    attention,
    cache,
    gemm,
    norm,
    quantize,
    sampling,
    scaled_gemm,
)
from llamatelemetry.triton_ops.group_gemm import FORMATS

# Raw ops: a step calls seven a layer, and what torch.library puts around them costs as much again.
_ops = torch.ops.llamatelemetry_triton
_linear = _ops.linear.default


def _of_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``llamatelemetry.ops.linear`` with a gate or no activation."""
    y = _linear(x, weight, bias, None if activation is None else _KINDS[activation])
    return y if residual is None else y + residual


def _of_groups(x: Tensor, linear: GroupLinear, activation: str | None = None) -> Tensor:
    """linear(x), with a gate or no activation."""
    return _ops.group_linear.default(
        *(x, linear.weight, linear.format, linear.out_features, linear.scales, linear.zeros),
        *(linear.perm, linear.bias, None if activation is None else _KINDS[activation]),
    )


def _of_bytes(x: QuantisedRows, linear: W8A8Linear) -> Tensor:
    """linear(x), of rows that are quantised already."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return _ops.scaled_linear.default(
        *(x.codes, x.scales, linear.weight, linear.weight_scales, x.dtype, bias),
        linear.takes.block,
    )


def _sinks(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, sinks=None: function(*args, None if sinks is None else sinks.float())


# What linear calls a gated activation -> what the kernels call it.
_KINDS = {"silu_and_mul": "silu", "gelu_and_mul": "gelu", "gelu_tanh_and_mul": "gelu_tanh"}

TRITON = OpSet(
    name="triton",
    rms_norm=_ops.rms_norm.default,
    fused_add_rms_norm_=_ops.fused_add_rms_norm_.default,
    layer_norm=_ops.layer_norm.default,
    rotary_embedding_=_ops.rotary_embedding_.default,
    append_kv_=_ops.append_kv_.default,
    rope_append_kv_=_ops.rope_append_kv_.default,
    flash_attn_varlen=_sinks(_ops.flash_attn_varlen.default),
    paged_attention=_sinks(_ops.paged_attention.default),
    linear=_of_rows,
    group_linear=_of_groups,
    group_formats=FORMATS,
    linear_of_any_rows=True,
    quantising=Quantising(
        _ops.rms_norm_quantize.default,
        _ops.fused_add_rms_norm_quantize_.default,
        _ops.silu_and_mul_quantize.default,
        _ops.quantize_rows.default,
    ),
    scaled_linear=_of_bytes,
    gated={name: partial(_ops.gated.default, activation=_KINDS[op]) for name, op in GATED.items()},
    activations={},  # of MLPs without a gate, which patch refuses
    all_reduce=lambda x: x,
    attn_implementation=None,
    sample=_ops.sample.default,
    advance_step_=_ops.advance_step_.default,
    slot_mapping=cache.slot_mapping,
)
