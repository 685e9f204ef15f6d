"""One tile of queries against tiles of keys: loads, scores, masks, online softmax in base 2."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.product import product

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(
    k_ptr, v_ptr, k_desc, v_desc, table_ptr, first, last, first_row, head_kv, page_size,
    k_block_stride, k_row_stride, v_block_stride, v_row_stride, head_dim, IS_PAGED: tl.constexpr,
    IN_ONE_PAGE: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_D, BLOCK_N] and values [BLOCK_N, BLOCK_D] of one tile; values past last are 0."""
    offsets = tl.arange(0, BLOCK_N)
    keys, lanes = first + offsets, tl.arange(0, BLOCK_D)
    inside = keys < last
    page, row = first * 0, first_row + first
    if IN_ONE_PAGE:
        page = tl.load(table_ptr + first // page_size)
        row = page * page_size + first % page_size
    if k_desc is not None:
        k = tl.trans(k_desc.load([row, head_kv, 0]).reshape(BLOCK_N, BLOCK_D))
        v = v_desc.load([row, head_kv, 0]).reshape(BLOCK_N, BLOCK_D)
        if MASKED:
            v = tl.where(inside[:, None], v, 0.0)
    else:
        if IN_ONE_PAGE:
            k_ptr += page.to(tl.int64) * k_block_stride + (first % page_size) * k_row_stride
            v_ptr += page.to(tl.int64) * v_block_stride + (first % page_size) * v_row_stride
            k_rows, v_rows = offsets * k_row_stride, offsets * v_row_stride
        elif IS_PAGED:
            pages = tl.load(table_ptr + keys // page_size, mask=inside, other=0).to(tl.int64)
            k_rows = pages * k_block_stride + keys % page_size * k_row_stride
            v_rows = pages * v_block_stride + keys % page_size * v_row_stride
        else:
            k_rows, v_rows = keys.to(tl.int64) * k_row_stride, keys.to(tl.int64) * v_row_stride
        k_ptrs = k_ptr + k_rows[None, :] + lanes[:, None]
        v_ptrs = v_ptr + v_rows[:, None] + lanes[None, :]
        if MASKED or not EVEN_D:
            present = inside[None, :] & (lanes < head_dim)[:, None]
            k = tl.load(k_ptrs, mask=present, other=0.0)
            v = tl.load(v_ptrs, mask=inside[:, None] & (lanes < head_dim)[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
    return k, v


@triton.jit
def attend_tile(
    q, largest, total, out, k_ptr, v_ptr, k_desc, v_desc, table_ptr, first, last, first_row,
    head_kv, positions, page_size, k_block_stride, k_row_stride, v_block_stride, v_row_stride,
    head_dim, scale, softcap, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IS_PAGED: tl.constexpr, IN_ONE_PAGE: tl.constexpr,
    SCALES_LATE: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: online softmax in base 2."""
    k, v = load_tile(
        k_ptr, v_ptr, k_desc, v_desc, table_ptr, first, last, first_row, head_kv, page_size,
        k_block_stride, k_row_stride, v_block_stride, v_row_stride, head_dim, IS_PAGED,
        IN_ONE_PAGE, MASKED, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    scores = product(q, k, tl.zeros((q.shape[0], BLOCK_N), tl.float32), PRECISION)
    if HAS_SOFTCAP:
        capped = 2.0 * scale / softcap * scores
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(capped))) * LOG2E
    elif not SCALES_LATE:
        scores *= scale * LOG2E
    if MASKED:
        keys = first + tl.arange(0, BLOCK_N)
        seen = (keys < last)[None, :]
        if HAS_RIGHT:
            seen = seen & (keys[None, :] <= positions[:, None] + right)
        if HAS_LEFT:
            seen = seen & (keys[None, :] >= positions[:, None] - left)
        scores = tl.where(seen, scores, float("-inf"))
    # A positive scale keeps the order, and is then multiplied where it is subtracted from.
    factor = scale * LOG2E if SCALES_LATE else 1.0
    above = tl.maximum(largest, tl.max(scores, axis=1) * factor)
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(above == float("-inf"), 0.0, above)
    weights = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(weights, axis=1)
    out = product(weights.to(v.dtype), v, out * shrink[:, None], PRECISION)
    return above, total, out


@triton.jit
def with_sink(largest, total, out, sink):
    """A softmax's sum and what it weighs, with a score more that nothing is added for."""
    sink = sink.to(tl.float32) * LOG2E
    above = tl.maximum(largest, sink)
    shrink = tl.exp2(largest - above)
    return total * shrink + tl.exp2(sink - above), out * shrink[:, None]
