"""Attention over packed sequences, keys dense or in pages; few queries split the keys.

The query heads that share a key head lie one under another in a tile: row r is query r // GROUP
of head r % GROUP, so that one tile serves prefill and decode.
"""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.attention_tiles import (
    LOG2E,
    attend_tile,
    with_sink,
)
from llamatelemetry.triton_ops.kernels.dependent import begin


@triton.jit
def key_range(tile, seqlen_q, seqlen_k, left, right, split, GROUP: tl.constexpr,
              HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SPLITS: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Keys that any row of a tile sees, [low, high), and where the part that all rows see ends."""
    before = seqlen_k - seqlen_q
    lowest = before + tile * BLOCK_M // GROUP
    highest = tl.minimum(before + (tile * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_k - 1)
    low, high = seqlen_k * 0, seqlen_k
    if HAS_LEFT:
        low = tl.maximum(lowest - left, 0)
    full = high
    if HAS_RIGHT:
        high = tl.minimum(high, tl.maximum(highest + right + 1, 0))
        full = tl.minimum(high, tl.maximum(lowest + right + 1, 0))
    low = low // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), SPLITS) * BLOCK_N
        low = low + split * share
        high = tl.minimum(high, low + share)
    whole = tl.maximum(tl.minimum(full, high) // BLOCK_N * BLOCK_N, low)
    if HAS_LEFT:
        whole = low
    return low, whole, high


# q, out: [total_q, num_heads_q, head_dim]; out [SPLITS, ...] float32 where split. k, v: [total_k,
# num_heads_kv, head_dim], or where paged [num_blocks, page_size, num_heads_kv, head_dim]. k_desc,
# v_desc: descriptors of k and v as [rows, num_heads_kv, head_dim], tiles of BLOCK_N rows of a
# head; or None: k and v are read by pointers. sinks: [num_heads_q] or None. lse: [SPLITS, total_q,
# num_heads_q] float32 in base 2 where split. starts: [batch + 1] int32, where each sequence's
# queries begin, and its keys if dense. seqlens: [batch] int32, table: [batch, max_blocks] int32,
# both None if dense.
@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, sinks_ptr, out_ptr, lse_ptr, starts_ptr, seqlens_ptr,
    table_ptr, table_stride, page_size, total_q, q_token_stride, q_head_stride, k_block_stride,
    k_row_stride, k_head_stride, v_block_stride, v_row_stride, v_head_stride, head_dim, scale,
    softcap, left, right, NUM_HEADS_KV: tl.constexpr, GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_PAGED: tl.constexpr, IN_ONE_PAGE: tl.constexpr, SCALES_LATE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one sequence and key head, over all its keys or a part of them."""
    begin(IS_DEPENDENT)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    sequence, head_kv = tl.program_id(1) // NUM_HEADS_KV, tl.program_id(1) % NUM_HEADS_KV
    split = tl.program_id(2)
    start = tl.load(starts_ptr + sequence)
    seqlen_q = tl.load(starts_ptr + sequence + 1) - start
    if tile * BLOCK_M < seqlen_q * GROUP:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        lanes = tl.arange(0, BLOCK_D)
        query, head = rows // GROUP, head_kv * GROUP + rows % GROUP
        row_mask = query < seqlen_q
        token = (start + query).to(tl.int64)
        q_ptrs = q_ptr + (token * q_token_stride + head * q_head_stride)[:, None] + lanes[None, :]
        q = tl.load(q_ptrs, mask=row_mask[:, None] & (lanes < head_dim)[None, :], other=0.0)
        if IS_PAGED:
            seqlen_k = tl.load(seqlens_ptr + sequence)
            table_ptr += sequence.to(tl.int64) * table_stride
        else:
            seqlen_k = seqlen_q
            k_ptr += start.to(tl.int64) * k_row_stride
            v_ptr += start.to(tl.int64) * v_row_stride
        k_ptr += head_kv.to(tl.int64) * k_head_stride
        v_ptr += head_kv.to(tl.int64) * v_head_stride
        positions = seqlen_k - seqlen_q + query
        low, whole, high = key_range(
            tile, seqlen_q, seqlen_k, left, right, split, GROUP, HAS_LEFT, HAS_RIGHT, SPLITS,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        out = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        for first in range(low, whole, BLOCK_N):
            largest, total, out = attend_tile(
                q, largest, total, out, k_ptr, v_ptr, k_desc, v_desc, table_ptr, first, seqlen_k,
                start, head_kv, positions, page_size, k_block_stride, k_row_stride,
                v_block_stride, v_row_stride, head_dim, scale, softcap, left, right, HAS_LEFT,
                HAS_RIGHT, HAS_SOFTCAP, IS_PAGED, IN_ONE_PAGE, SCALES_LATE, False, BLOCK_N,
                BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip
        for first in range(whole, high, BLOCK_N):
            largest, total, out = attend_tile(
                q, largest, total, out, k_ptr, v_ptr, k_desc, v_desc, table_ptr, first, high,
                start, head_kv, positions, page_size, k_block_stride, k_row_stride,
                v_block_stride, v_row_stride, head_dim, scale, softcap, left, right, HAS_LEFT,
                HAS_RIGHT, HAS_SOFTCAP, IS_PAGED, IN_ONE_PAGE, SCALES_LATE, True, BLOCK_N,
                BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip
        num_heads: tl.constexpr = NUM_HEADS_KV * GROUP
        where = token * num_heads + head
        if SPLITS > 1:
            where += split.to(tl.int64) * total_q * num_heads
            lse = tl.where(total > 0, largest + tl.log2(total), float("-inf"))
            tl.store(lse_ptr + where, lse, mask=row_mask)
        elif sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=row_mask, other=0.0)
            total, out = with_sink(largest, total, out, sink)
        out = out / tl.where(total > 0, total, 1.0)[:, None]
        out_ptrs = out_ptr + (where * head_dim)[:, None] + lanes[None, :]
        mask = row_mask[:, None] & (lanes < head_dim)[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combine_attention_kernel(
    parts_ptr,  # [SPLITS, total_q, num_heads, head_dim] float32
    lse_ptr,  # [SPLITS, total_q, num_heads] float32, in base 2
    sinks_ptr,  # [num_heads] or None
    out_ptr,  # [total_q, num_heads, head_dim]
    rows,
    num_heads,
    head_dim,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    splits, lanes = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + splits * rows + row, mask=splits < SPLITS, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    sink = float("-inf")
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row % num_heads).to(tl.float32) * LOG2E
        largest = tl.maximum(largest, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(lse - base)
    total = tl.sum(weights, axis=0)
    if sinks_ptr is not None:
        total += tl.exp2(sink - base)
    # A part that saw no key has stored zeros; one of rows past the end stored nothing.
    mask = (weights > 0)[:, None] & (lanes < head_dim)[None, :]
    where = (splits * rows + row)[:, None] * head_dim + lanes[None, :]
    parts = tl.load(parts_ptr + where, mask=mask, other=0.0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    where = row * head_dim + lanes
    tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=lanes < head_dim)
