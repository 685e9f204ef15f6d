"""Products of two matrices, and linear layers of a byte a value on both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake


def gemm(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``alpha * a @ b + beta * c``, summed in float32 and rounded once.

    Args:
        a: [m, k] or [batch, m, k], float32, float16 or bfloat16, any strides; with trans_a
            [..., k, m].
        b: [k, n] or [batch, k, n], dtype and device of a, any strides; with trans_b [..., n, k].
        alpha: What the product is multiplied by.
        beta: What c is multiplied by; where it is 0, c is not read.
        trans_a: Whether a comes transposed.
        trans_b: Whether b comes transposed.
        c: Shape, dtype and device of the result; rows contiguous.
        backend: None for the fastest that serves the call, or "sm90" (Hopper's tensor cores),
            "sm80", "sm75", "simt" or "cpu".

    Returns:
        [m, n] or [batch, m, n], dtype of a, contiguous. On CUDA a matrix whose rows do not lie at
        multiples of 16 bytes is copied to ones that do first.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        BLAS (Dongarra et al. 1990); wgmma and mma.sync of the PTX ISA.
    """
    inference_only("gemm", a=a, b=b, c=c)
    return torch.ops.llamatelemetry.gemm.default(a, b, alpha, beta, trans_a, trans_b, c, backend)


def _product_shape(a: Tensor, b: Tensor, trans_a: bool, trans_b: bool) -> tuple[int, ...]:
    m, n = a.shape[-1 if trans_a else -2], b.shape[-2 if trans_b else -1]
    return (*a.shape[:-2], m, n)


@register_fake("gemm")
def _(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    return a.new_empty(_product_shape(a, b, trans_a, trans_b))


def tensor_core_gemm(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``alpha * a @ b + beta * c`` of 16-bit matrices in float32, by tensor cores where there are.

    Args:
        a: [m, k] or [batch, m, k], float16 or bfloat16, any strides; with trans_a [..., k, m].
        b: [k, n] or [batch, k, n], dtype and device of a, any strides; with trans_b [..., n, k].
        alpha: What the product is multiplied by.
        beta: What c is multiplied by; where it is 0, c is not read.
        trans_a: Whether a comes transposed.
        trans_b: Whether b comes transposed.
        c: Shape and device of the result, float32; rows contiguous.
        backend: As of gemm.

    Returns:
        [m, n] or [batch, m, n], float32, contiguous.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        wgmma and mma.sync of the PTX ISA.
    """
    inference_only("tensor_core_gemm", a=a, b=b, c=c)
    return torch.ops.llamatelemetry.tensor_core_gemm.default(
        a, b, alpha, beta, trans_a, trans_b, c, backend
    )


@register_fake("tensor_core_gemm")
def _(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    return a.new_empty(_product_shape(a, b, trans_a, trans_b), dtype=torch.float32)


def tensor_core_gemm_int8(
    a: Tensor,
    b: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``a @ b`` of int8 matrices in int32, exact.

    Args:
        a: [m, k] or [batch, m, k], int8, any strides; with trans_a [..., k, m]. k is at most
            131071, whose sums fit int32.
        b: [k, n] or [batch, k, n], int8, device of a, any strides; with trans_b [..., n, k]. On
            CUDA the fastest is a along k and b with trans_b, or any of that memory: tensor cores
            read bytes along k alone, so others are turned round first.
        trans_a: Whether a comes transposed.
        trans_b: Whether b comes transposed.
        backend: As of gemm.

    Returns:
        [m, n] or [batch, m, n], int32, contiguous.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        wgmma and mma.sync of the PTX ISA.
    """
    inference_only("tensor_core_gemm_int8", a=a, b=b)
    return torch.ops.llamatelemetry.tensor_core_gemm_int8.default(a, b, trans_a, trans_b, backend)


@register_fake("tensor_core_gemm_int8")
def _(
    a: Tensor,
    b: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    backend: str | None = None,
) -> Tensor:
    return a.new_empty(_product_shape(a, b, trans_a, trans_b), dtype=torch.int32)


def scaled_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """``(x @ weight.T) * x_scales * weight_scales.T + bias`` of a byte a value: W8A8.

    Args:
        x: [..., k], int8 or float8_e4m3fn; rows contiguous, evenly spaced. What quantize_rows,
            rms_norm_quantize and silu_and_mul_quantize return.
        x_scales: float32, one for each row of x, contiguous.
        weight: [n, k], dtype and device of x.
        weight_scales: float32, one for each row of the weight, contiguous.
        dtype: Of the result: float32, float16 or bfloat16.
        bias: [n], of dtype.
        block: None, or 128, of e4m3: x_scales are [..., ceil(k / 128)], for 128 values of a row
            each, weight_scales [ceil(n / 128), ceil(k / 128)], for 128 x 128 values, and multiply
            the sums over 128 of k.

    Returns:
        [..., n] in dtype. Sums of int8 are int32 and exact, sums of e4m3 float32, but Hopper's
        tensor cores keep some 14 bits within 128 of k; scales and bias follow in float32, and one
        rounding. Other GPUs multiply e4m3 as float16.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        LLM.int8() (Dettmers et al. 2022) for a scale a row on both sides; DeepSeek-V3
        (arXiv:2412.19437) for blocks.
    """
    inference_only("scaled_linear", bias=bias)
    return torch.ops.llamatelemetry.scaled_linear.default(
        x, x_scales, weight, weight_scales, dtype, bias, block
    )


@register_fake("scaled_linear")
def _(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
