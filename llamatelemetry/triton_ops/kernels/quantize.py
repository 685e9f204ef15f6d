"""Rows of a byte a value, with the scale of a row or of blocks of it: a program a row."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.activation import gated
from llamatelemetry.triton_ops.kernels.dependent import begin
from llamatelemetry.triton_ops.kernels.norm import normed

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
SMALLEST_FLOAT = tl.constexpr(1.1754943508222875e-38)  # that is not subnormal
ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: beside it float32 has whole numbers alone


@triton.jit
def of_e4m3(y):
    """The nearest value of e4m3, ties to even; conversions of the interpreter do not carry."""
    size = tl.abs(y)
    bits = size.to(tl.int32, bitcast=True)
    nearest = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (size + ROUNDS / 512) - ROUNDS / 512  # below 2^-6 values are 2^-9 apart
    nearest = tl.where(size < 0.015625, small, nearest).to(tl.int32, bitcast=True)
    sign = y.to(tl.int32, bitcast=True) & -0x80000000  # of zeros too
    return (nearest | sign).to(tl.float32, bitcast=True)


@triton.jit
def quantize_kernel(
    x_ptr,  # [rows, width], of SOURCE "gated" [rows, 2 * width]: gates, then what they multiply
    residual_ptr,  # as rms_norm_kernel's, of SOURCE "rms_norm" alone; as weight_ptr
    weight_ptr,
    q_ptr,  # [rows, width] int8 or e4m3
    scales_ptr,  # [rows, ceil(width / GROUP)] float32
    x_stride,
    residual_stride,
    width,
    eps,
    weight_offset,
    SOURCE: tl.constexpr,  # what is quantised: "rows", their "rms_norm", or silu(gate) * up
    HAS_OFFSET: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if SOURCE == "rms_norm":
        y = normed(
            x_ptr, residual_ptr, weight_ptr, row, x_stride, residual_stride, width, eps,
            weight_offset, HAS_OFFSET, BLOCK, dtype,
        )  # fmt: skip
    else:
        y = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
        if SOURCE == "gated":
            up = tl.load(x_ptr + row * x_stride + width + columns, mask=mask, other=0.0)
            y = gated(y, up, "silu", dtype)
    groups: tl.constexpr = BLOCK // GROUP
    y = tl.reshape(y.to(tl.float32), (groups, GROUP))
    to_int8: tl.constexpr = q_ptr.dtype.element_ty == tl.int8
    limit: tl.constexpr = 127.0 if to_int8 else 448.0
    # A maximum would pass NaN over: what is not finite becomes infinity first.
    sizes = tl.where(tl.abs(y) <= LARGEST_FLOAT, tl.abs(y), float("inf"))
    largest = tl.max(sizes, axis=1)
    scales = tl.div_rn(largest, tl.full((groups,), limit, tl.float32))
    usable = (scales >= SMALLEST_FLOAT) & (largest <= LARGEST_FLOAT)
    ones = tl.full((groups,), 1.0, tl.float32)
    inverse = tl.div_rn(ones, tl.where(usable, scales, 1.0))
    y = tl.where(usable[:, None], y * inverse[:, None], 0.0)
    if to_int8:
        q = ((y + ROUNDS) - ROUNDS).to(tl.int8)
    else:
        q = tl.minimum(tl.maximum(of_e4m3(y), -limit), limit).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * width + columns, tl.reshape(q, (BLOCK,)), mask=mask)
    number, count = tl.arange(0, groups), tl.cdiv(width, GROUP)
    scales = tl.where(largest <= LARGEST_FLOAT, scales, float("nan"))
    tl.store(scales_ptr + row * count + number, scales, mask=number < count)
