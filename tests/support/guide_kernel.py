"""The Triton kernel that the guide registers; Triton reads a kernel's source from its file."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, out_ptr, num_elements, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + at, mask=at < num_elements)
    tl.store(out_ptr + at, 2 * x, mask=at < num_elements)
