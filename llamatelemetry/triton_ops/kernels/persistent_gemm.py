"""Linear layers of many rows: programs that stay, and tiles read by descriptors (TMA)."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.gemm import added, place_of, scaled, store_tile
from llamatelemetry.triton_ops.kernels.product import product


@triton.jit
def persistent_linear_kernel(
    x_desc,  # [m, k], tiles of [BLOCK_M, BLOCK_K]; past the end it reads zeros
    weight_desc,  # [n, k], or [2 * n, k] where gated; tiles of [BLOCK_N, BLOCK_K]
    bias_ptr,  # as many as weight has rows, or None
    x_scales_ptr,  # as linear_kernel's
    weight_scales_ptr,
    out_ptr,  # [m, n]
    m,
    n,
    k,
    ACTIVATION: tl.constexpr,  # of a gated layer, or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        is_int8: tl.constexpr = x_desc.dtype == tl.int8
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if is_int8 else tl.float32)
        ups = sums
        for step in range(0, k, BLOCK_K):
            x = x_desc.load([row, step])
            w = weight_desc.load([column, step])
            rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
            sums = added(
                x, tl.trans(w), sums, x_scales_ptr, weight_scales_ptr, rows, columns,
                rows < m, columns < n, step, k, SCALE_BLOCK, PRECISION,
            )  # fmt: skip
            if ACTIVATION is not None:
                u = weight_desc.load([column + n, step])
                ups = product(x, tl.trans(u), ups, PRECISION)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        sums = scaled(
            sums, x_scales_ptr, weight_scales_ptr, rows, columns, rows < m, columns < n,
            SCALE_BLOCK,
        )  # fmt: skip
        store_tile(
            sums, ups, bias_ptr, out_ptr, rows, columns, rows < m, columns < n, n, ACTIVATION
        )  # fmt: skip
