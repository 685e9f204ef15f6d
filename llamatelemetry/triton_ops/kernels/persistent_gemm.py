"""Linear layers of many rows: programs that stay, and tiles read by descriptors (TMA)."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.activation import gated
from llamatelemetry.triton_ops.kernels.gemm import biased, scaled
from llamatelemetry.triton_ops.kernels.product import product


@triton.jit
def persistent_linear_kernel(
    x_desc,  # [m, k], tiles of [BLOCK_M, BLOCK_K]; past the end it reads zeros
    weight_desc,  # [n, k], or [2 * n, k] where gated; tiles of [BLOCK_N, BLOCK_K]
    bias_ptr,  # as many as weight has rows, or None
    x_scales_ptr,  # [m] float32 of quantised rows, not gated; or None, as weight's
    weight_scales_ptr,  # [n] float32 or None
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
):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        # Tiles of GROUP_M rows of tiles run beside each other, so that they share weights in L2.
        first = tile // (GROUP_M * tiles_n) * GROUP_M
        rows_here = tl.minimum(tiles_m - first, GROUP_M)
        row = (first + tile % (GROUP_M * tiles_n) % rows_here) * BLOCK_M
        column = tile % (GROUP_M * tiles_n) // rows_here * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        ups = sums
        for step in range(0, k, BLOCK_K):
            x = x_desc.load([row, step])
            w = weight_desc.load([column, step])
            sums = product(x, tl.trans(w), sums, PRECISION)
            if ACTIVATION is not None:
                u = weight_desc.load([column + n, step])
                ups = product(x, tl.trans(u), ups, PRECISION)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        sums = scaled(
            sums, x_scales_ptr, weight_scales_ptr, rows, columns, rows < m, columns < n
        )  # fmt: skip
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        out = biased(sums, bias_ptr, columns, columns < n, dtype)
        if ACTIVATION is not None:
            up = biased(ups, bias_ptr, columns + n, columns < n, dtype)
            out = gated(out, up, ACTIVATION, dtype)
        mask = (rows < m)[:, None] & (columns < n)[None, :]
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :], out, mask=mask)
