"""A token from logits: the largest by blocks, then a program a row that filters and draws.

The filters search their thresholds bit by bit, each bit one pass over the row's logits, which lie
in L2: exact, whatever the logits, and no sort.
"""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.dependent import begin


@triton.jit
def logits_at(logits_ptr, columns, vocab_size):
    """In float32; a NaN and what lies past the end count as -inf."""
    x = tl.load(logits_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
    x = x.to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def ordered(x):
    """Integers in the order of the floats."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def largest_kernel(
    logits_ptr,  # [batch, vocab_size]
    largest_ptr,  # [batch, blocks] float32
    ids_ptr,  # [batch, blocks] int64: the lowest id of each block's largest
    row_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin(IS_DEPENDENT)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(logits_ptr + row * row_stride + columns, mask=columns < vocab_size,
                  other=float("nan")).to(tl.float32)  # fmt: skip
    is_number = raw == raw
    x = tl.where(is_number, raw, float("-inf"))
    largest = tl.max(x, axis=0)
    first = tl.min(tl.where(is_number & (x == largest), columns, vocab_size), axis=0)
    where = row * tl.num_programs(1) + block
    tl.store(largest_ptr + where, largest)
    tl.store(ids_ptr + where, first.to(tl.int64))


@triton.jit
def mass_from(logits_ptr, scale, largest, floor, vocab_size, BLOCK: tl.constexpr):
    """How many logits are at least floor in order, and the sum of their exponentials."""
    count, mass = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        x = logits_at(logits_ptr, first + tl.arange(0, BLOCK), vocab_size)
        kept = (ordered(x) >= floor) & (x > float("-inf"))
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp((x - largest) * scale), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def floor_of_top_k(logits_ptr, scale, largest, floor, top_k, vocab_size, BLOCK: tl.constexpr):
    """The largest floor that keeps top_k logits, equals included, found bit by bit."""
    for bit in range(32):
        step = tl.full((), 1, tl.int64) << (31 - bit)
        higher = (floor.to(tl.int64) + step).to(tl.int32)
        count, _ = mass_from(logits_ptr, scale, largest, higher, vocab_size, BLOCK)
        floor = tl.where(count >= top_k, higher, floor)
    return floor


@triton.jit
def floor_of_top_p(logits_ptr, scale, largest, floor, wanted, vocab_size, BLOCK: tl.constexpr):
    """The largest floor whose mass is wanted, and of its equals the id from which they are kept:
    the higher ids, as few as fill what is missing."""
    for bit in range(32):
        step = tl.full((), 1, tl.int64) << (31 - bit)
        higher = (floor.to(tl.int64) + step).to(tl.int32)
        is_inside = floor.to(tl.int64) + step <= 2147483647
        _, above = mass_from(logits_ptr, scale, largest, higher, vocab_size, BLOCK)
        floor = tl.where(is_inside & (above >= wanted) & (above > 0), higher, floor)
    _, above = mass_from(logits_ptr, scale, largest, floor + 1, vocab_size, BLOCK)
    low, high = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32) + vocab_size - 1
    while low < high:
        middle = low + (high - low + 1) // 2
        equals = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocab_size, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            x = logits_at(logits_ptr, columns, vocab_size)
            at_floor = (ordered(x) == floor) & (columns >= middle)
            equals += tl.where(at_floor, tl.exp((x - largest) * scale), 0.0)
        filled = tl.sum(equals, axis=0)
        enough = (filled > 0) & (above + filled >= wanted)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return floor, low


@triton.jit
def weights_at(logits_ptr, columns, scale, largest, floor, cut, min_p, vocab_size):
    """Of each logit that is kept, its probability in units of the largest's; else 0."""
    x = logits_at(logits_ptr, columns, vocab_size)
    key = ordered(x)
    kept = (key > floor) | ((key == floor) & (columns >= cut))
    weight = tl.where(kept, tl.exp((x - largest) * scale), 0.0)
    return tl.where(weight >= min_p, weight, 0.0)


@triton.jit
def draw_kernel(
    logits_ptr,  # [batch, vocab_size]
    largest_ptr,  # [batch, blocks] float32
    ids_ptr,  # [batch, blocks] int64
    temperature_ptr,  # [batch] float32
    top_k_ptr,  # [batch] int32
    top_p_ptr,  # [batch] float32
    min_p_ptr,  # [batch] float32
    seed_ptr,  # [batch] int64
    offset_ptr,  # [batch] int64
    out_ptr,  # [batch] int64
    row_stride,
    vocab_size,
    blocks,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    parts = tl.arange(0, BLOCK_B)
    maxima = tl.load(largest_ptr + row * blocks + parts, mask=parts < blocks, other=float("-inf"))
    ids = tl.load(ids_ptr + row * blocks + parts, mask=parts < blocks, other=vocab_size)
    largest = tl.max(maxima, axis=0)
    token = tl.min(tl.where(maxima == largest, ids, vocab_size), axis=0)
    token = tl.where(token >= vocab_size, 0, token)  # all are NaN
    temperature = tl.load(temperature_ptr + row)
    is_finite = (largest / temperature > float("-inf")) & (largest / temperature < float("inf"))
    if (temperature > 0) & is_finite:
        scale = 1.0 / temperature
        lowest: tl.constexpr = -2147483647 - 1
        floor = tl.full((), lowest, tl.int32)
        _, mass = mass_from(logits_ptr, scale, largest, floor, vocab_size, BLOCK)
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < vocab_size):
            floor = floor_of_top_k(logits_ptr, scale, largest, floor, top_k, vocab_size, BLOCK)
            _, mass = mass_from(logits_ptr, scale, largest, floor, vocab_size, BLOCK)
        top_p = tl.load(top_p_ptr + row)
        cut = tl.full((), 0, tl.int32)  # of the logits at the floor, those from this id on are kept
        if top_p < 1.0:
            wanted = tl.maximum(top_p, 0.0) * (1.0 - 1.1920929e-07) * mass
            floor, cut = floor_of_top_p(
                logits_ptr, scale, largest, floor, wanted, vocab_size, BLOCK
            )
        min_p = tl.minimum(tl.load(min_p_ptr + row), 1.0)
        # Below: the sums of blocks in order of ids, and where they pass the number drawn.
        total = tl.full((), 0.0, tl.float32)
        for first in range(0, vocab_size, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            total += tl.sum(
                weights_at(logits_ptr, columns, scale, largest, floor, cut, min_p, vocab_size),
                axis=0,
            )
        seed, offset = tl.load(seed_ptr + row), tl.load(offset_ptr + row)
        low_word = (offset & 0xFFFFFFFF).to(tl.uint32)
        high_word = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
        zero = tl.full((), 0, tl.uint32)
        r0, r1, _, _ = tl.philox(seed, low_word, high_word, zero, zero)
        number = r1.to(tl.uint32).to(tl.float64) * 2.3283064365386963e-10
        number += r0.to(tl.uint32).to(tl.float64) * 5.421010862427522e-20
        target = (number * total.to(tl.float64)).to(tl.float32)
        target = tl.minimum(target, total * (1.0 - 1.1920929e-07))
        passed = tl.full((), 0.0, tl.float32)
        found = tl.full((), 0, tl.int32) + vocab_size
        for first in range(0, vocab_size, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            weight = weights_at(logits_ptr, columns, scale, largest, floor, cut, min_p, vocab_size)
            here = tl.sum(weight, axis=0)
            if (found == vocab_size) & (passed + here > target):
                sums = passed + tl.cumsum(weight, axis=0)
                at = tl.min(tl.where((weight > 0) & (sums > target), columns, vocab_size), axis=0)
                last = tl.max(tl.where(weight > 0, columns, 0), axis=0)
                found = tl.where(at < vocab_size, at, last)
            passed += here
        token = tl.where(found < vocab_size, found.to(tl.int64), token)
    tl.store(out_ptr + row, token)
