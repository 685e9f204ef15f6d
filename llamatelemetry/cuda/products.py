"""Products of two matrices by kernels of ours, their gradients by torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        return _Product.apply(ops.gemm, a, b, c, alpha, beta, trans_a, trans_b)
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
        return _Product.apply(ops.tensor_core_gemm, a, b, c, alpha, beta, trans_a, trans_b)
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


class _Product(torch.autograd.Function):
    """The op itself, so that its checks and its value are those without gradients."""

    @staticmethod
    def forward(
        op: Callable[..., Tensor],
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        alpha: float,
        beta: float,
        trans_a: bool,
        trans_b: bool,
    ) -> Tensor:
        return op(a, b, alpha, beta, trans_a, trans_b, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, a, b, c, ctx.alpha, ctx.beta, ctx.trans_a, ctx.trans_b = inputs
        ctx.save_for_backward(a, b)
        ctx.c_dtype = c.dtype if c is not None and ctx.beta else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """In float32, each gradient rounded once to the dtype of what it is of."""
        a, b = ctx.saved_tensors
        _, needs_a, needs_b, needs_c, *_ = ctx.needs_input_grad
        of_a = of_b = of_c = None
        grad = grad.float()
        of_product = ctx.alpha * grad
        if needs_a:
            of_a = of_product @ (b if ctx.trans_b else b.mT).float()
            of_a = (of_a.mT if ctx.trans_a else of_a).to(a.dtype)
        if needs_b:
            of_b = (a if ctx.trans_a else a.mT).float() @ of_product
            of_b = (of_b.mT if ctx.trans_b else of_b).to(b.dtype)
        if needs_c and ctx.c_dtype is not None:  # where beta is 0, c is not read
            of_c = (ctx.beta * grad).to(ctx.c_dtype)
        return None, of_a, of_b, of_c, None, None, None, None
