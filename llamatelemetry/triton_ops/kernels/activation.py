"""The activations of gated MLPs, for epilogues and for the kernel that runs them alone."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """act(gate) * up, both rounded to dtype before, the activation rounded before the product."""
    gate = gate.to(dtype).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh(y)) / 2 is sigmoid(2 y)
    return (active.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def gated_kernel(
    x_ptr,  # [rows, 2 * size]: gates, then what they multiply
    out_ptr,  # [rows, size]
    x_stride,
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + size + columns, mask=mask, other=0.0)
    out = gated(gate, up, ACTIVATION, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + columns, out, mask=mask)
