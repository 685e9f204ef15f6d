"""Linear layers of few tiles (stream-K): programs that share the steps of k of all tiles evenly."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.gemm import added, place_of, scaled, store_tile


@triton.jit
def first_step(program, share, more):
    """Where a program's steps begin: each has share of them, the first programs one more."""
    return program * share + tl.minimum(program, more)


@triton.jit
def holder_of(step, share, more):
    """The program that has a step."""
    of_more = more * (share + 1)
    return tl.where(step < of_more, step // (share + 1), more + (step - of_more) // share)


@triton.jit
def with_parts(
    sums, ups, parts_ptr, ready_ptr, first, last, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums and ups with those that programs first to last - 1 have stored, in this order."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = rows[:, None] * BLOCK_N + columns[None, :]
    size: tl.constexpr = BLOCK_M * BLOCK_N * (1 if ACTIVATION is None else 2)
    for program in range(first, last):
        while tl.atomic_add(ready_ptr + program, 0, sem="acquire") == 0:
            pass
        tl.debug_barrier()  # what one thread has seen, all have
        where = parts_ptr + program * size + inside
        sums += tl.load(where, cache_modifier=".cg")
        if ACTIVATION is not None:
            ups += tl.load(where + BLOCK_M * BLOCK_N, cache_modifier=".cg")
    return sums, ups


@triton.jit
def store_part(
    sums, ups, parts_ptr, ready_ptr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores what this program has of a tile for the one that ends it."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    size: tl.constexpr = BLOCK_M * BLOCK_N * (1 if ACTIVATION is None else 2)
    where = parts_ptr + tl.program_id(0) * size
    where += rows[:, None] * BLOCK_N + columns[None, :]
    tl.store(where, sums)
    if ACTIVATION is not None:
        tl.store(where + BLOCK_M * BLOCK_N, ups)
    tl.debug_barrier()
    tl.atomic_xchg(ready_ptr + tl.program_id(0), 1, sem="release")


@triton.jit
def stream_linear_kernel(
    x_desc,  # as persistent_linear_kernel's, as all up to out_ptr
    weight_desc,
    bias_ptr,
    x_scales_ptr,
    weight_scales_ptr,
    out_ptr,  # [m, n]
    parts_ptr,  # [programs, 1 or where gated 2, BLOCK_M, BLOCK_N] float32
    ready_ptr,  # [programs] int32 zeros
    m,
    n,
    k,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    steps, programs = tl.cdiv(k, BLOCK_K), tl.num_programs(0)
    share, more = tiles_m * tiles_n * steps // programs, tiles_m * tiles_n * steps % programs
    begin = first_step(tl.program_id(0), share, more)
    end = first_step(tl.program_id(0) + 1, share, more)
    # The last tile first: the part of it that this program has is stored long before the next
    # program, which ends that tile, comes to it. Nobody waits for a later program.
    for i in range(0, tl.cdiv(end, steps) - begin // steps):
        tile = tl.cdiv(end, steps) - 1 - i
        first = tl.maximum(begin - tile * steps, 0)
        last = tl.minimum(end - tile * steps, steps)
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        is_int8: tl.constexpr = x_desc.dtype == tl.int8
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if is_int8 else tl.float32)
        ups = sums
        for step in range(first * BLOCK_K, last * BLOCK_K, BLOCK_K):
            x = x_desc.load([row, step])
            w = weight_desc.load([column, step])
            sums = added(
                x, tl.trans(w), sums, x_scales_ptr, weight_scales_ptr, rows, columns,
                rows < m, columns < n, step, k, SCALE_BLOCK, PRECISION,
            )  # fmt: skip
            if ACTIVATION is not None:
                u = weight_desc.load([column + n, step])
                ups = added(
                    x, tl.trans(u), ups, None, None, rows, columns, rows < m, columns < n, step,
                    k, 0, PRECISION,
                )  # fmt: skip
        sums = scaled(
            sums, x_scales_ptr, weight_scales_ptr, rows, columns, rows < m, columns < n,
            SCALE_BLOCK,
        )  # fmt: skip
        if last < steps:
            store_part(sums, ups, parts_ptr, ready_ptr, ACTIVATION, BLOCK_M, BLOCK_N)
        else:
            holder = holder_of(tile * steps, share, more)
            if first == 0:
                holder = tl.program_id(0)
            sums, ups = with_parts(
                sums, ups, parts_ptr, ready_ptr, holder, tl.program_id(0), ACTIVATION, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
            store_tile(
                sums, ups, bias_ptr, out_ptr, rows, columns, rows < m, columns < n, n, ACTIVATION
            )  # fmt: skip
