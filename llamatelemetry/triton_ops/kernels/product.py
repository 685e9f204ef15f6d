"""tl.dot, and what stands for it where Triton's interpreter has no bfloat16 product."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b, in float32; of int8 in int32, exactly."""
    if PRECISION == "int8":
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    elif PRECISION == "interpreted":
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    elif PRECISION == "fp8":  # Hopper keeps some 14 bits of a sum: within a tile alone
        sums = tl.dot(a, b, sums, max_num_imprecise_acc=a.shape[1])
    elif PRECISION == "ieee":
        # Without tensor cores a dot adds one product after another; sums over thousands stay as
        # exact as cuBLAS's where each tile begins at zero. Subtracted, for Triton would fold a sum.
        part = tl.zeros(sums.shape, dtype=tl.float32)
        sums = sums - tl.dot(-a, b, part, input_precision=PRECISION)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums
