"""Linear layers over codes of 4 or 8 bits with a scale a group: multiplied packed, or expanded.

A word of 32 bits holds PER_WORD codes of one row; the words of 16 rows lie side by side, and word
i of a row holds the columns that columns_of names. Codes less their zero points are exact in
every dtype of x, and a tile of k inside one group is scaled after its product.
"""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.dependent import begin
from llamatelemetry.triton_ops.kernels.gemm import biased
from llamatelemetry.triton_ops.kernels.product import product


@triton.jit
def columns_of(words, part, BITS: tl.constexpr):
    """The column of k of a word's part: of 4 bits, the low halves of 16 bytes precede the high."""
    if BITS == 4:
        columns = words // 4 * 32 + part % 2 * 16 + words % 4 * 4 + part // 2
    else:
        columns = words * 4 + part
    return columns


@triton.jit
def code_of(words, part, BITS: tl.constexpr, ZERO: tl.constexpr):
    """A part's code as float32, less ZERO; the bits are put in a mantissa, which no unit slows."""
    if BITS == 4:
        bits = (words >> (part * 4)) & 15
        below: tl.constexpr = 8388608.0 + ZERO
    else:
        bits = ((words >> (part * 8)) & 255) ^ 128  # a sign bit turned over is 128 more
        below: tl.constexpr = 8388608.0 + 128.0
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - below


@triton.jit
def arrange_kernel(
    x_ptr,  # [m, k]
    perm_ptr,  # [k] int32: column j of the weight is multiplied by column perm[j] of x; or None
    out_ptr,  # [PER_WORD, m, k / PER_WORD]: column columns_of(word, part) at [part, :, word]
    m,
    num_words,
    x_stride,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin(IS_DEPENDENT)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = words < num_words
    at = columns_of(words, part, BITS)
    if perm_ptr is not None:
        at = tl.load(perm_ptr + at, mask=inside, other=0)
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0)
    tl.store(out_ptr + (part * m + row) * num_words + words, x, mask=inside)


@triton.jit
def group_linear_kernel(
    x_ptr,  # [PER_WORD, m, k / PER_WORD], from arrange_kernel
    words_ptr,  # [ceil(n / 16), k / PER_WORD, 16] int32
    scales_ptr,  # [ceil(n / 16), groups, 16] float32
    zeros_ptr,  # likewise uint8, or None
    bias_ptr,  # [n] or None
    out_ptr,  # [m, n]; sums [SPLITS, m, n] float32 where IS_PART
    m,
    n,
    padded_n,  # a multiple of 16
    k,
    group,  # columns of k that share a scale
    BITS: tl.constexpr,
    ZERO: tl.constexpr,  # of codes of 4 bits without zeros
    IS_PART: tl.constexpr,
    IN_ONE_GROUP: tl.constexpr,  # whether no tile of k crosses a group's border
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,  # words of a row
    PRECISION: tl.constexpr,
):
    """All rows of x by BLOCK_N rows of weight, over all of k or a part of it."""
    PER_WORD: tl.constexpr = 32 // BITS
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, present = rows < m, columns < padded_n
    lanes = tl.arange(0, BLOCK_W)
    num_words, groups = k // PER_WORD, k // group
    tile, lane = (columns // 16).to(tl.int64), columns % 16
    w_ptrs = words_ptr + (tile * num_words * 16 + lane)[None, :] + lanes[:, None] * 16
    scale_at = tile * groups * 16 + lane
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * num_words + lanes[None, :]
    steps = tl.cdiv(tl.cdiv(num_words, BLOCK_W), SPLITS)
    begin = tl.program_id(1) * steps * BLOCK_W
    end = tl.minimum(begin + steps * BLOCK_W, num_words)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(begin, end, BLOCK_W):
        held = first + lanes
        inside = held < num_words
        words = tl.load(w_ptrs + first * 16, mask=inside[:, None] & present[None, :], other=0)
        if IN_ONE_GROUP:
            where = (scale_at + first * PER_WORD // group * 16)[None, :]
            seen = present[None, :]
        else:
            where = scale_at[None, :] + (held * PER_WORD // group * 16)[:, None]
            seen = inside[:, None] & present[None, :]
        scale = tl.load(scales_ptr + where, mask=seen, other=0.0)
        zero = tl.zeros(scale.shape, tl.float32)
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + where, mask=seen, other=0).to(tl.float32)
        part_sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for part in tl.static_range(PER_WORD):
            x = tl.load(
                x_ptrs + part * m * num_words + first,
                mask=row_mask[:, None] & inside[None, :],
                other=0.0,
            )
            w = code_of(words, part, BITS, ZERO) - zero
            if not IN_ONE_GROUP:
                w *= scale
            part_sums = product(x, w.to(x.dtype), part_sums, PRECISION)
        sums += part_sums * scale if IN_ONE_GROUP else part_sums
    mask = row_mask[:, None] & (columns < n)[None, :]
    if IS_PART:
        where = (tl.program_id(1).to(tl.int64) * m + rows)[:, None] * n + columns[None, :]
        tl.store(out_ptr + where, sums, mask=mask)
    else:
        out = biased(sums, bias_ptr, columns, columns < n, out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :], out, mask=mask)


@triton.jit
def expand_kernel(
    words_ptr,  # as group_linear_kernel's
    scales_ptr,
    zeros_ptr,
    perm_ptr,  # as arrange_kernel's
    out_ptr,  # [n, k]: the weights, columns in the order of x
    n,
    k,
    group,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < n)[:, None] & (at < k)[None, :]
    tile, lane = (rows // 16).to(tl.int64), rows % 16
    if BITS == 4:  # columns_of the other way round
        word = at // 32 * 4 + at % 16 // 4
        part = at % 4 * 2 + at % 32 // 16
    else:
        word, part = at // 4, at % 4
    where = (tile * (k // PER_WORD) * 16 + lane)[:, None] + (word * 16)[None, :]
    codes = code_of(tl.load(words_ptr + where, mask=mask, other=0), part[None, :], BITS, ZERO)
    where = (tile * (k // group) * 16 + lane)[:, None] + (at // group * 16)[None, :]
    if zeros_ptr is not None:
        codes -= tl.load(zeros_ptr + where, mask=mask, other=0).to(tl.float32)
    codes *= tl.load(scales_ptr + where, mask=mask, other=0.0)
    if perm_ptr is not None:
        at = tl.load(perm_ptr + at, mask=at < k, other=0)
    where = rows.to(tl.int64)[:, None] * k + at[None, :]
    tl.store(out_ptr + where, codes.to(out_ptr.dtype.element_ty), mask=mask)
