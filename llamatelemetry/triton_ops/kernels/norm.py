"""Norms: a program a row, the whole row in registers."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.dependent import begin


@triton.jit
def weighted(x, scale, weight, weight_offset, HAS_OFFSET: tl.constexpr, dtype: tl.constexpr):
    """x * scale * weight: rounded before the product, with an offset once after it."""
    if HAS_OFFSET:
        return (x * scale * (weight.to(tl.float32) + weight_offset)).to(dtype)
    return ((x * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def normed(
    x_ptr, residual_ptr, weight_ptr, row, x_stride, residual_stride, width, eps, weight_offset,
    HAS_OFFSET: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The rms_norm of a row [BLOCK] in dtype, zeros behind its end; of residual with x added to it,
    which is stored, where there is one."""
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if residual_ptr is not None:
        where = residual_ptr + row * residual_stride + columns
        residual = tl.load(where, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(where, x, mask=mask)
    x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    return weighted(x, scale, weight, weight_offset, HAS_OFFSET, dtype)


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [rows, width]
    residual_ptr,  # [rows, width] or None: x is added to it, and the sum is normed
    weight_ptr,  # [width]
    out_ptr,  # [rows, width]
    x_stride,
    residual_stride,
    out_stride,
    width,
    eps,
    weight_offset,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    out = normed(
        x_ptr, residual_ptr, weight_ptr, row, x_stride, residual_stride, width, eps,
        weight_offset, HAS_OFFSET, BLOCK, out_ptr.dtype.element_ty,
    )  # fmt: skip
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * out_stride + columns, out, mask=columns < width)


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [rows, width]
    weight_ptr,  # [width] or None
    bias_ptr,  # [width] or None
    out_ptr,  # [rows, width]
    x_stride,
    width,
    eps,
    weight_offset,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    apart = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
    out = apart / tl.sqrt(tl.sum(apart * apart, axis=0) / width + eps)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        out *= weight + weight_offset
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
