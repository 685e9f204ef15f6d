"""The Triton kernels. Each program takes a block of elements, or one row in blocks.

Importing this needs Triton. Statistics are in float32 (float64 for float64 inputs); offsets are
int64; lanes past the end load what changes no result and store nothing.
"""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wide(x):
    """In the type that statistics are kept in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def add_kernel(
    x_ptr,  # [num_elements]
    y_ptr,  # [num_elements]
    out_ptr,  # [num_elements]
    num_elements,
    BLOCK_SIZE: tl.constexpr,
):
    """out = x + y, rounded once. Memory bound: a program a block."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    if x.dtype.is_floating():
        x, y = _wide(x), _wide(y)  # the sum of two bfloat16 is not bfloat16's on every machine
    tl.store(out_ptr + offsets, (x + y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layernorm_kernel(
    x_ptr,  # [num_rows, width]
    weight_ptr,  # [width] or None
    bias_ptr,  # [width] or None
    out_ptr,  # [num_rows, width]
    width,
    eps,
    BLOCK_SIZE: tl.constexpr,
):
    """out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, a program a row.

    Three passes over the row, the second and third from cache: the variance is of x - mean, so
    that nothing cancels, and lanes past the width count neither in the mean nor in the variance.
    """
    start = tl.program_id(0).to(tl.int64) * width
    lanes = tl.arange(0, BLOCK_SIZE)
    total = tl.sum(_wide(tl.load(x_ptr + start + lanes, mask=lanes < width, other=0.0)), axis=0)
    for first in range(BLOCK_SIZE, width, BLOCK_SIZE):
        columns = first + lanes
        x = _wide(tl.load(x_ptr + start + columns, mask=columns < width, other=0.0))
        total += tl.sum(x, axis=0)
    mean = total / width
    squares = total * 0.0
    for first in range(0, width, BLOCK_SIZE):
        columns = first + lanes
        x = _wide(tl.load(x_ptr + start + columns, mask=columns < width, other=0.0))
        apart = tl.where(columns < width, x - mean, 0.0)
        squares += tl.sum(apart * apart, axis=0)
    scale = 1.0 / tl.sqrt(squares / width + eps)
    for first in range(0, width, BLOCK_SIZE):
        columns = first + lanes
        mask = columns < width
        out = (_wide(tl.load(x_ptr + start + columns, mask=mask, other=0.0)) - mean) * scale
        if weight_ptr is not None:
            out *= _wide(tl.load(weight_ptr + columns, mask=mask, other=0.0))
        if bias_ptr is not None:
            out += _wide(tl.load(bias_ptr + columns, mask=mask, other=0.0))
        tl.store(out_ptr + start + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_kernel(
    x_ptr,  # [outer, size, inner]
    out_ptr,  # [outer, size, inner]
    size,
    inner,
    BLOCK_SIZE: tl.constexpr,
):
    """out = exp(x - max(x)) / sum(exp(x - max(x))) over size, a program a row of outer * inner.

    Maximum, sum, output: a pass each, so that a row of all -inf, and nothing else, becomes NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    start = row // inner * size * inner + row % inner
    lanes = tl.arange(0, BLOCK_SIZE).to(tl.int64)
    x = _wide(tl.load(x_ptr + start + lanes * inner, mask=lanes < size, other=float("-inf")))
    largest = tl.max(x, axis=0)
    for first in range(BLOCK_SIZE, size, BLOCK_SIZE):
        columns = first + lanes
        mask = columns < size
        x = _wide(tl.load(x_ptr + start + columns * inner, mask=mask, other=float("-inf")))
        largest = tl.maximum(largest, tl.max(x, axis=0))
    total = tl.sum(tl.zeros_like(x), axis=0)
    for first in range(0, size, BLOCK_SIZE):
        columns = first + lanes
        mask = columns < size
        x = _wide(tl.load(x_ptr + start + columns * inner, mask=mask, other=0.0))
        total += tl.sum(tl.where(mask, tl.exp(x - largest), 0.0), axis=0)
    for first in range(0, size, BLOCK_SIZE):
        columns = first + lanes
        mask = columns < size
        x = _wide(tl.load(x_ptr + start + columns * inner, mask=mask, other=0.0))
        out = tl.exp(x - largest) / total
        tl.store(out_ptr + start + columns * inner, out.to(out_ptr.dtype.element_ty), mask=mask)
