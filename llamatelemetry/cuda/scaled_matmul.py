"""Products of 16-bit matrices in float32, of inputs scaled so that none overflows."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504


def scaled_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` with both rounded to dtype, summed and returned in float32.

    For float16 each row of a, and each column of b, that goes beyond 65504 is scaled by a power
    of two and the product scaled back. Nothing is read on the host.

    Args:
        a: [..., m, k], any floating dtype.
        b: [..., k, n], any floating dtype; leading dims broadcast against a's.
        dtype: float16 or bfloat16.

    Returns:
        [..., m, n] float32.
    """
    a, a_exponents = _rounded(a, dtype, dim=-1)
    b, b_exponents = _rounded(b, dtype, dim=-2)
    out = _product(a, b)
    for exponents in (a_exponents, b_exponents):  # one by one: 2 to their sum may overflow
        if exponents is not None:
            out = torch.ldexp(out, exponents)
    return out


def _rounded(x: Tensor, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor | None]:
    """x over a power of two in dtype, and the exponents along dim, None where all are zero."""
    if dtype != torch.float16 or x.dtype == torch.float16 or x.shape[dim] == 0:
        return x.to(dtype), None
    largest = x.detach().abs().amax(dim, keepdim=True).float()
    _, exponents = torch.frexp(largest / FLOAT16_MAX)
    # In float32: the gradient of torch.ldexp by negative integers is zero.
    exponents = torch.where(largest.isfinite(), exponents, 0).clamp(min=0).float()
    return torch.ldexp(x, -exponents).to(dtype), exponents


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two tensors of one 16-bit dtype in float32, on tensor cores where there are.

    Elsewhere, and where a gradient is needed, the rounded inputs are multiplied in float32: the
    products are exact there too, and the sums as wide.
    """
    needs_grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if not a.is_cuda or needs_grad or not a.numel() or not b.numel():
        return a.float() @ b.float()
    if b.ndim == 2:
        out = torch.mm(a.reshape(-1, a.shape[-1]), b, out_dtype=torch.float32)
        return out.view(*a.shape[:-1], b.shape[-1])
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]) for x in (a, b))
    a3, b3 = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    out = torch.bmm(a3, b3, out_dtype=torch.float32)
    return out.view(*batch, a.shape[-2], b.shape[-1])
