"""Rows of a byte a value as custom ops; semantics are those of ``llamatelemetry.ops``."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.triton_ops.kernels.quantize import quantize_kernel
from llamatelemetry.triton_ops.launch import (
    check,
    check_apart,
    check_shape,
    dependent,
    next_power_of_2,
    on_device,
    rows_to_write,
    why_no_e4m3_on,
)

BLOCK = 128  # columns of a block with a scale of its own
_LANES = 512  # elements of a row for each 32 threads


def _check(op: str, x: Tensor, dtype: torch.dtype, block: int | None) -> None:
    if not x.dim():
        raise RuntimeError(f"{op}: x must be [..., size], got {list(x.shape)}")
    check(op, "x", x)
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise RuntimeError(f"{op}: dtype must be int8 or float8_e4m3fn, got {dtype}")
    if block not in (None, BLOCK):
        raise RuntimeError(f"{op}: block must be None or {BLOCK}, got {block}")
    if dtype != torch.int8 and (reason := why_no_e4m3_on(x.device)) is not None:
        raise RuntimeError(f"{op}: {reason}")


def _empty(x: Tensor, size: int, dtype: torch.dtype, block: int | None) -> tuple[Tensor, Tensor]:
    """q [..., size] and its scales, as long as they are to be."""
    count = 1 if block is None else -(-size // block)
    leading = x.shape[:-1]
    return (
        torch.empty((*leading, size), dtype=dtype, device=x.device),
        torch.empty((*leading, count), dtype=torch.float32, device=x.device),
    )


def _run(
    x: Tensor,
    size: int,
    dtype: torch.dtype,
    block: int | None,
    source: str,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    q, scales = _empty(x, size, dtype, block)
    if not q.numel():
        return q, scales.zero_()
    rows = x.reshape(-1, x.shape[-1])
    width = next_power_of_2(size, block or 1)
    with on_device(x):
        quantize_kernel[(len(rows),)](
            *(rows, residual, weight, q, scales, rows.stride(0)),
            *(0 if residual is None else residual.stride(0), size, eps, weight_offset),
            SOURCE=source,
            HAS_OFFSET=weight_offset != 0.0,
            GROUP=block or width,
            BLOCK=width,
            num_warps=min(max(width // _LANES, 1), 16),
            enable_fp_fusion=False,  # a value times 1 / scale is rounded before it becomes whole
            **dependent(x.device),
        )
    return q, scales


@torch.library.custom_op("llamatelemetry_triton::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, dtype: torch.dtype, block: int | None = None) -> tuple[Tensor, Tensor]:
    """``llamatelemetry.ops.quantize_rows`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    _check("quantize_rows", x, dtype, block)
    return _run(x, x.shape[-1], dtype, block, "rows")


@quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype, block: int | None = None) -> tuple[Tensor, Tensor]:
    return _empty(x, x.shape[-1], dtype, block)


@torch.library.custom_op("llamatelemetry_triton::rms_norm_quantize", mutates_args=())
def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``llamatelemetry.ops.rms_norm_quantize`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "rms_norm_quantize"
    _check(op, x, dtype, block)
    check(op, "weight", weight, like=x)
    check_shape(op, "weight", weight, x.shape[-1:])
    return _run(x, x.shape[-1], dtype, block, "rms_norm", None, weight, eps, weight_offset)


@rms_norm_quantize.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    return _empty(x, x.shape[-1], dtype, block)


@torch.library.custom_op(
    "llamatelemetry_triton::fused_add_rms_norm_quantize_", mutates_args=("residual",)
)
def fused_add_rms_norm_quantize_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``llamatelemetry.ops.fused_add_rms_norm_quantize_`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "fused_add_rms_norm_quantize_"
    _check(op, x, dtype, block)
    check(op, "residual", residual, like=x)
    check(op, "weight", weight, like=x)
    check_shape(op, "residual", residual, x.shape)
    check_shape(op, "weight", weight, x.shape[-1:])
    rows = rows_to_write(op, "residual", residual)
    check_apart(op, x.reshape(rows.shape), rows)
    return _run(x, x.shape[-1], dtype, block, "rms_norm", rows, weight, eps, weight_offset)


@fused_add_rms_norm_quantize_.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    return _empty(x, x.shape[-1], dtype, block)


@torch.library.custom_op("llamatelemetry_triton::silu_and_mul_quantize", mutates_args=())
def silu_and_mul_quantize(
    x: Tensor, dtype: torch.dtype, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """``llamatelemetry.ops.silu_and_mul_quantize`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "silu_and_mul_quantize"
    _check(op, x, dtype, block)
    if x.shape[-1] % 2:
        raise RuntimeError(f"{op}: x must have an even number of columns, got {x.shape[-1]}")
    return _run(x, x.shape[-1] // 2, dtype, block, "gated")


@silu_and_mul_quantize.register_fake
def _(x: Tensor, dtype: torch.dtype, block: int | None = None) -> tuple[Tensor, Tensor]:
    return _empty(x, x.shape[-1] // 2, dtype, block)
