"""Linear layers of a byte a value on both sides as a custom op: int8, or fp8 e4m3."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llamatelemetry.quantization.fields import MOST_INT8_COLUMNS
from llamatelemetry.triton_ops import gemm
from llamatelemetry.triton_ops.launch import (
    FLOATS,
    check_shape,
    on_device,
    why_no_e4m3_on,
    why_not_on,
    width_of,
)
from llamatelemetry.triton_ops.quantize import BLOCK
from llamatelemetry.triton_ops.tuning import linear_config


@torch.library.custom_op("llamatelemetry_triton::scaled_linear", mutates_args=())
def scaled_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """``llamatelemetry.ops.scaled_linear`` in Triton.

    Args:
        x: [..., k] int8 or float8_e4m3fn, k a multiple of 16, from 16 on.
        x_scales: float32, one for each row of x, contiguous.
        weight: [n, k], dtype and device of x.
        weight_scales: float32, one for each row of weight, contiguous.
        dtype: Of the result: float32, float16 or bfloat16.
        bias: [n], of dtype.
        block: None, or 128, of e4m3: x_scales are [..., ceil(k / 128)], for 128 values of a row
            each, weight_scales [ceil(n / 128), ceil(k / 128)], for 128 x 128 values.

    Returns:
        [..., n] in dtype. Sums of int8 are int32 and exact, but parts of k, which few rows may be
        cut in, are added in float32; sums of e4m3 are float32, but Hopper's tensor cores keep some
        14 bits within a tile of k. Scales and bias follow in float32, and one rounding.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    _check(x, x_scales, weight, weight_scales, dtype, bias, block)
    (n, k), rows = weight.shape, x.reshape(-1, x.shape[-1])
    out = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    if out.numel():
        config = linear_config(len(rows), n, k, False, x.dtype, x.device)
        if block is not None:
            config = replace(config, block_k=min(config.block_k, block))
        scales = (x_scales, weight_scales)
        with on_device(x):
            gemm.run(rows, weight, bias, None, out, config, scales, block or 0)
    return out


@scaled_linear.register_fake
def _(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _check(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    block: int | None,
) -> None:
    op = "scaled_linear"
    k = _check_x(op, x, dtype, block)
    if not weight.dim():
        raise RuntimeError(f"{op}: weight must be [n, {k}], got {list(weight.shape)}")
    check_shape(op, "weight", weight, (weight.shape[0], k))
    n, counts = weight.shape[0], (x.numel() // k, weight.shape[0])
    if block is not None:
        blocks = -(-k // block)
        check_shape(op, "x_scales", x_scales, (*x.shape[:-1], blocks))
        check_shape(op, "weight_scales", weight_scales, (-(-n // block), blocks))
        counts = (x_scales.numel(), weight_scales.numel())
    _check_kind(op, "weight", weight, x, x.dtype)
    _check_kind(op, "x_scales", x_scales, x, torch.float32, counts[0])
    _check_kind(op, "weight_scales", weight_scales, x, torch.float32, counts[1])
    if bias is not None:
        check_shape(op, "bias", bias, (n,))
        _check_kind(op, "bias", bias, x, dtype, n)
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.numel() and tensor.stride(-1) != 1:
            raise RuntimeError(
                f"{op}: {name} must have contiguous rows, got strides {tensor.stride()}"
            )


def _check_x(op: str, x: Tensor, dtype: torch.dtype, block: int | None) -> int:
    """The columns of x."""
    if (reason := why_not_on(x.device)) is not None:
        raise RuntimeError(f"{op}: x: {reason}")
    if x.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise RuntimeError(f"{op}: x must be int8 or float8_e4m3fn, got {x.dtype}")
    if x.dtype != torch.int8 and (reason := why_no_e4m3_on(x.device)) is not None:
        raise RuntimeError(f"{op}: {reason}")
    if dtype not in FLOATS:
        raise RuntimeError(f"{op}: dtype must be float32, float16 or bfloat16, got {dtype}")
    if block is not None and (block != BLOCK or x.dtype == torch.int8):
        raise RuntimeError(
            f"{op}: block must be None, or {BLOCK} of e4m3, got {block} of {x.dtype}"
        )
    k = width_of(op, x)
    if k % 16 or not k:
        raise RuntimeError(f"{op}: k must be a multiple of 16, from 16 on, got {k}")
    if x.dtype == torch.int8 and k > MOST_INT8_COLUMNS:
        raise RuntimeError(
            f"{op}: k of int8 must be at most {MOST_INT8_COLUMNS}, whose sums fit int32, got {k}"
        )
    return k


def _check_kind(
    op: str, name: str, tensor: Tensor, x: Tensor, kind: torch.dtype, count: int | None = None
) -> None:
    """On the device of x; of count contiguous values where that is given."""
    if tensor.dtype != kind or tensor.device != x.device:
        raise RuntimeError(
            f"{op}: {name} must be {kind} on {x.device} as x, got {tensor.dtype} on {tensor.device}"
        )
    if count is not None and (tensor.numel() != count or not tensor.is_contiguous()):
        raise RuntimeError(
            f"{op}: {name} must be {count} contiguous values, got {list(tensor.shape)} with "
            f"strides {tensor.stride()}"
        )
