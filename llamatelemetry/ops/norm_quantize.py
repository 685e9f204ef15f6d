"""Rows quantised to a byte a value, as they are or where a norm or a gate makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake


def quantize_rows(x: Tensor, dtype: torch.dtype, block: int | None = None) -> tuple[Tensor, Tensor]:
    """``q = round(x / scales)`` with ``scales = max |x| / 127`` (int8) or ``/ 448`` (e4m3) a row.

    Args:
        x: [..., size], float32, float16 or bfloat16; rows contiguous, evenly spaced.
        dtype: int8 or float8_e4m3fn.
        block: 128 for a scale for each 128 values of a row, the last of what is left; None for
            one a row.

    Returns:
        q in dtype, [..., size], contiguous; scales, [..., 1] or [..., ceil(size / 128)] float32.
        What shares a scale below float32's normal numbers is zeros; with NaN or infinity in it the
        scale is NaN.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        LLM.int8() (Dettmers et al. 2022), a scale a row.
    """
    inference_only("quantize_rows", x=x)
    return torch.ops.llamatelemetry.quantize_rows.default(x, dtype, block)


def _quantised_like(
    x: Tensor, size: int, dtype: torch.dtype, block: int | None
) -> tuple[Tensor, Tensor]:
    rows, count = x.shape[:-1], 1 if block is None else (size + block - 1) // block
    return x.new_empty((*rows, size), dtype=dtype), x.new_empty((*rows, count), dtype=torch.float32)


@register_fake("quantize_rows")
def _(x: Tensor, dtype: torch.dtype, block: int | None = None) -> tuple[Tensor, Tensor]:
    return _quantised_like(x, x.shape[-1], dtype, block)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(rms_norm(x, weight, eps, weight_offset), dtype)``, on CUDA in one kernel.

    Args:
        x: [..., hidden_size], float32, float16 or bfloat16; rows contiguous, evenly spaced.
        weight: [hidden_size], dtype and device of x.
        dtype: int8 or float8_e4m3fn.
        eps: Added to the mean of squares.
        weight_offset: Added to the weight.
        block: As of quantize_rows.

    Returns:
        q in dtype, shape of x, and scales as quantize_rows gives them.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    inference_only("rms_norm_quantize", x=x, weight=weight)
    return torch.ops.llamatelemetry.rms_norm_quantize.default(
        x, weight, dtype, eps, weight_offset, block
    )


@register_fake("rms_norm_quantize")
def _(
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    return _quantised_like(x, x.shape[-1], dtype, block)


def fused_add_rms_norm_quantize_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``residual += x``, rounded, and rms_norm_quantize of it, on CUDA in one kernel.

    Args:
        x: [..., hidden_size], float32, float16 or bfloat16; rows contiguous, evenly spaced.
        residual: Shape, dtype and device of x, rows likewise; written. No memory of x.
        weight: [hidden_size], dtype and device of x.
        dtype: int8 or float8_e4m3fn.
        eps: Added to the mean of squares.
        weight_offset: Added to the weight.
        block: As of quantize_rows.

    Returns:
        q in dtype, shape of x, and scales as quantize_rows gives them.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    inference_only("fused_add_rms_norm_quantize_", x=x, residual=residual, weight=weight)
    return torch.ops.llamatelemetry.fused_add_rms_norm_quantize_.default(
        x, residual, weight, dtype, eps, weight_offset, block
    )


@register_fake("fused_add_rms_norm_quantize_")
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    return _quantised_like(x, x.shape[-1], dtype, block)


def silu_and_mul_quantize(
    x: Tensor, dtype: torch.dtype, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_rows(silu_and_mul(x), dtype)``, on CUDA in one kernel.

    Args:
        x: [..., 2 * size], gate then up, float32, float16 or bfloat16; rows contiguous, evenly
            spaced.
        dtype: int8 or float8_e4m3fn.
        block: As of quantize_rows.

    Returns:
        q in dtype, [..., size], and scales as quantize_rows gives them.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        Shazeer 2020, arXiv:2002.05202.
    """
    inference_only("silu_and_mul_quantize", x=x)
    return torch.ops.llamatelemetry.silu_and_mul_quantize.default(x, dtype, block)


@register_fake("silu_and_mul_quantize")
def _(x: Tensor, dtype: torch.dtype, block: int | None = None) -> tuple[Tensor, Tensor]:
    return _quantised_like(x, x.shape[-1] // 2, dtype, block)
