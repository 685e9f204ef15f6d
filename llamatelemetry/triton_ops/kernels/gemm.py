"""Linear layers: tiles of tl.dot, whole or in parts of k, with bias and gate in the epilogue."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.activation import gated
from llamatelemetry.triton_ops.kernels.product import product


@triton.jit
def biased(sums, bias_ptr, columns, mask, dtype: tl.constexpr):
    """Sums with the bias; rounded once, as a linear layer's output."""
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return sums.to(dtype)


@triton.jit
def place_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Which tile of rows and of columns: those of GROUP_M rows of tiles run beside each other, so
    that they share weights in L2."""
    group = tile // (GROUP_M * tiles_n)
    rows_here = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + tile % (GROUP_M * tiles_n) % rows_here
    return tile_m, tile % (GROUP_M * tiles_n) // rows_here


@triton.jit
def store_tile(
    sums, ups, bias_ptr, out_ptr, rows, columns, row_mask, column_mask, n,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Writes a tile of outputs, with the bias and gate."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = biased(sums, bias_ptr, columns, column_mask, dtype)
    if ACTIVATION is not None:
        up = biased(ups, bias_ptr, columns + n, column_mask, dtype)
        out = gated(out, up, ACTIVATION, dtype)
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :], out, mask=mask)


@triton.jit
def added(
    a, b, sums, x_scales_ptr, weight_scales_ptr, rows, columns, row_mask, column_mask, first, k,
    SCALE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + a @ b, of columns of k from first on; times the scales of their block, where each
    SCALE_BLOCK of k have one."""
    if SCALE_BLOCK:
        block, blocks = first // SCALE_BLOCK, tl.cdiv(k, SCALE_BLOCK)
        where = rows.to(tl.int64) * blocks + block
        x_scales = tl.load(x_scales_ptr + where, mask=row_mask, other=0.0)
        where = columns // SCALE_BLOCK * blocks + block
        weight_scales = tl.load(weight_scales_ptr + where, mask=column_mask, other=0.0)
        part = product(a, b, tl.zeros(sums.shape, tl.float32), PRECISION)
        sums += part * x_scales[:, None] * weight_scales[None, :]
    else:
        sums = product(a, b, sums, PRECISION)
    return sums


@triton.jit
def scaled(
    sums, x_scales_ptr, weight_scales_ptr, rows, columns, row_mask, column_mask,
    SCALE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of quantised values times the scales of their rows, where there are any."""
    if x_scales_ptr is not None and SCALE_BLOCK == 0:
        sums = sums.to(tl.float32)
        x_scales = tl.load(x_scales_ptr + rows, mask=row_mask, other=0.0)
        weight_scales = tl.load(weight_scales_ptr + columns, mask=column_mask, other=0.0)
        sums *= x_scales[:, None]
        sums *= weight_scales[None, :]
    return sums


@triton.jit
def linear_kernel(
    x_ptr,  # [m, k]
    weight_ptr,  # [n, k], or [2 * n, k] where gated: gates, then what they multiply
    bias_ptr,  # as many as weight has rows, or None
    x_scales_ptr,  # [m] float32 of quantised rows, not gated; or None, as weight's
    weight_scales_ptr,  # [n] float32 or None; of blocks both are [.., ceil(k / SCALE_BLOCK)]
    out_ptr,  # [m, n]; sums [SPLITS, m, weight's rows] float32 where SPLITS > 1
    m,
    n,
    k,
    x_stride,
    weight_stride,
    ACTIVATION: tl.constexpr,  # of a gated layer, or None
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,  # columns that share a scale, a multiple of BLOCK_K; 0: a row's do
):
    tile_m, tile_n = place_of(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M
    )  # fmt: skip
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    row_mask, column_mask = rows < m, columns < n
    # Rows of weight past the end are read at the first one's place, and never stored; rows of x
    # are not read: of two rows, fourteen more would be a third of what a program fetches.
    safe_rows = tl.where(row_mask, rows, 0).to(tl.int64)
    safe_columns = (columns if EVEN_N else tl.where(column_mask, columns, 0)).to(tl.int64)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS)
    begin = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, k)
    x_ptrs = x_ptr + safe_rows[:, None] * x_stride + lanes[None, :]
    w_ptrs = weight_ptr + safe_columns[None, :] * weight_stride + lanes[:, None]
    u_ptrs = weight_ptr + (safe_columns + n)[None, :] * weight_stride + lanes[:, None]
    is_int8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if is_int8 else tl.float32)
    ups = sums
    for first in range(begin, end, BLOCK_K):
        if EVEN_K:
            if EVEN_M:
                x = tl.load(x_ptrs + first)
            else:
                x = tl.load(x_ptrs + first, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptrs + first)
        else:
            inside = first + lanes < k
            x = tl.load(x_ptrs + first, mask=row_mask[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptrs + first, mask=inside[:, None], other=0.0)
        sums = added(
            x, w, sums, x_scales_ptr, weight_scales_ptr, rows, columns, row_mask, column_mask,
            first, k, SCALE_BLOCK, PRECISION,
        )  # fmt: skip
        if ACTIVATION is not None:
            if EVEN_K:
                u = tl.load(u_ptrs + first)
            else:
                u = tl.load(u_ptrs + first, mask=inside[:, None], other=0.0)
            ups = product(x, u, ups, PRECISION)
    sums = scaled(
        sums, x_scales_ptr, weight_scales_ptr, rows, columns, row_mask, column_mask, SCALE_BLOCK
    )
    if SPLITS == 1:
        store_tile(
            sums, ups, bias_ptr, out_ptr, rows, columns, row_mask, column_mask, n, ACTIVATION
        )  # fmt: skip
    else:
        mask = row_mask[:, None] & column_mask[None, :]
        width = n if ACTIVATION is None else 2 * n
        where = (tl.program_id(1).to(tl.int64) * m + rows)[:, None] * width + columns[None, :]
        tl.store(out_ptr + where, sums, mask=mask)
        if ACTIVATION is not None:
            tl.store(out_ptr + where + n, ups, mask=mask)


@triton.jit
def summed(sums_ptr, m, width, row, columns, mask, SPLITS: tl.constexpr):
    """The parts' sums added in order, [1, columns]."""
    total = tl.zeros((1, columns.shape[0]), dtype=tl.float32)
    for part in range(SPLITS):
        where = (part * m + row) * width + columns[None, :]
        total += tl.load(sums_ptr + where, mask=mask[None, :], other=0.0)
    return total


@triton.jit
def combine_kernel(
    sums_ptr,  # [SPLITS, m, weight's rows] float32
    bias_ptr,
    out_ptr,  # [m, n]
    m,
    n,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    width = n if ACTIVATION is None else 2 * n
    sums = summed(sums_ptr, m, width, row, columns, mask, SPLITS)
    out = biased(sums, bias_ptr, columns, mask, dtype)
    if ACTIVATION is not None:
        ups = summed(sums_ptr + n, m, width, row, columns, mask, SPLITS)
        out = gated(out, biased(ups, bias_ptr, columns + n, mask, dtype), ACTIVATION, dtype)
    tl.store(out_ptr + row * n + columns[None, :], out, mask=mask[None, :])
