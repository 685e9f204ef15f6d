"""Products of two matrices by kernels of ours; where a gradient is needed, by torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry import ops

__all__ = ["gemm", "tensor_core_gemm", "tensor_core_gemm_int8"]


def gemm(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """``alpha * a @ b + beta * c``, summed in float32 and rounded once.

    Args:
        a: [m, k] or [batch, m, k], float32, float16 or bfloat16; with trans_a [..., k, m].
        b: [k, n] or [batch, k, n], dtype and device of a; with trans_b [..., n, k].
        alpha: what the product is multiplied by.
        beta: what c is multiplied by; where it is 0, c is not read.
        trans_a: whether a comes transposed.
        trans_b: whether b comes transposed.
        c: [m, n] or [batch, m, n], dtype and device of a.

    Returns:
        [m, n] or [batch, m, n], dtype of a.

    Raises:
        RuntimeError: naming the argument, the rule and the value.

    Example:
        >>> gemm(torch.ones(2, 3), torch.ones(4, 3), 0.5, 2.0, trans_b=True, c=torch.ones(2, 4))
        tensor([[3.5000, 3.5000, 3.5000, 3.5000],
                [3.5000, 3.5000, 3.5000, 3.5000]])
    """
    if _needs_grad(a, b, c):
        return _differentiable(a, b, alpha, beta, trans_a, trans_b, c)
    return ops.gemm(a, b, alpha, beta, trans_a, trans_b, c)


def tensor_core_gemm(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """``alpha * a @ b + beta * c`` of 16-bit matrices in float32, by tensor cores where there are.

    Args:
        a: [m, k] or [batch, m, k], float16 or bfloat16; with trans_a [..., k, m].
        b: [k, n] or [batch, k, n], dtype and device of a; with trans_b [..., n, k].
        alpha: what the product is multiplied by.
        beta: what c is multiplied by; where it is 0, c is not read.
        trans_a: whether a comes transposed.
        trans_b: whether b comes transposed.
        c: [m, n] or [batch, m, n], float32, device of a.

    Returns:
        [m, n] or [batch, m, n], float32.

    Raises:
        RuntimeError: naming the argument, the rule and the value.

    Example:
        >>> tensor_core_gemm(torch.full((1, 2), 300.0).half(), torch.full((2, 1), 300.0).half())
        tensor([[180000.]])
    """
    if _needs_grad(a, b, c):
        return _differentiable(a.float(), b.float(), alpha, beta, trans_a, trans_b, c)
    return ops.tensor_core_gemm(a, b, alpha, beta, trans_a, trans_b, c)


def tensor_core_gemm_int8(
    a: Tensor, b: Tensor, trans_a: bool = False, trans_b: bool = False
) -> Tensor:
    """``a @ b`` of int8 matrices in int32, exact.

    Args:
        a: [m, k] or [batch, m, k], int8; with trans_a [..., k, m]. k is at most 131071.
        b: [k, n] or [batch, k, n], int8, device of a; with trans_b [..., n, k], which tensor cores
            read as it is.
        trans_a: whether a comes transposed.
        trans_b: whether b comes transposed.

    Returns:
        [m, n] or [batch, m, n], int32.

    Raises:
        RuntimeError: naming the argument, the rule and the value.

    Example:
        >>> a = torch.full((1, 1000), -128, dtype=torch.int8)
        >>> tensor_core_gemm_int8(a, a, trans_b=True)
        tensor([[16384000]], dtype=torch.int32)
    """
    return ops.tensor_core_gemm_int8(a, b, trans_a, trans_b)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _differentiable(
    a: Tensor, b: Tensor, alpha: float, beta: float, trans_a: bool, trans_b: bool, c: Tensor | None
) -> Tensor:
    out = alpha * ((a.mT if trans_a else a) @ (b.mT if trans_b else b))
    if not beta:
        return out
    if c is None:
        raise RuntimeError(f"gemm: c must be given where beta is not 0, got None and beta = {beta}")
    return out + beta * c
