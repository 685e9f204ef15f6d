"""Linear layers, dense and over quantised weights, and products of two matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake
from llamatelemetry.ops.formats import QuantFormat, format_name


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``residual + activation(x @ weight.T + bias)``, each step rounded as modules apart round it.

    Args:
        x: [..., k], float32, float16 or bfloat16; rows contiguous, evenly spaced.
        weight: [n, k], dtype and device of x; rows contiguous.
        bias: [n], dtype and device of x.
        residual: Shape of the result, dtype and device of x.
        activation: None, "relu", "relu2", "silu", "gelu", "gelu_tanh", or one of "silu_and_mul",
            "gelu_and_mul" and "gelu_tanh_and_mul": the first half of the weight's rows are gates,
            the second half what they multiply.

    Returns:
        [..., n] in the dtype of x, [..., n / 2] where gated. Products are summed in float32. Few
        rows of x are a kernel of ours: on the CPU up to 16, and in a Recording any number; on CUDA
        up to 8, and up to 16 where n is at most 64 a multiprocessor, if x has two bytes a value and
        rows lie at multiples of 16 bytes. Other calls are torch's matmul. Among calls of our kernel
        a row does not depend on the other rows, nor, on CUDA within 1 to 8 or 9 to 16, on how many
        there are.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        torch.nn.functional.linear.
    """
    inference_only("linear", x=x, weight=weight, bias=bias, residual=residual)
    return torch.ops.llamatelemetry.linear.default(x, weight, bias, residual, activation)


@register_fake("linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    n = weight.shape[0]
    return x.new_empty((*x.shape[:-1], n // 2 if (activation or "").endswith("_and_mul") else n))


def quant_linear(
    x: Tensor,
    packed: Tensor,
    format: QuantFormat | int | str,
    n: int,
    bias: Tensor | None = None,
    exact: bool = False,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` with the weight packed in 4 to 8 bits; sums in float32.

    Args:
        x: [..., k], float32, float16 or bfloat16; rows contiguous, evenly spaced.
        packed: What repack returns for the weight's [n, k].
        format: A QuantFormat, its name or its GGML type number; or "U4", "S4", "S8" or "E4M3",
            whose scales stand beside the codes: llamatelemetry.quantization.groups packs them.
        n: Rows of the weight.
        bias: [n], dtype and device of x.
        exact: Whether x stays as it is. Otherwise the CPU rounds it to 8 bits in blocks of 32
            (``scale = absmax / 127``), which is several times faster; a block with NaN or infinity
            gives NaN. CUDA never rounds x; from 9 rows on of 16-bit x on Hopper, elsewhere for many
            rows (past 32 or 64 of 16-bit x, past 8 of float32), it rounds the weights to the dtype
            of x. "E4M3" is always exact on the CPU.
        scales: [ceil(n / 16), groups, 16] float32, for "U4", "S4", "S8" and "E4M3" alone: 16 rows
            side by side. A group is 32, 64, 128 or all weights of a row.
        zeros: Likewise uint8, for "U4": ``weight = scale * (code - zero)``.
        perm: [k] int32, for the formats with scales: column j of the weight meets column perm[j] of
            x, as where a quantiser sorted the columns (GPTQ's act-order). Where perm names no
            column x counts as 0.

    Returns:
        [..., n] in the dtype of x. On the CPU a row does not depend on the other rows, nor on how
        many there are.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        The blocks are GGUF's; 8-bit activations in blocks of 32 are ggml's Q8_0.
    """
    inference_only("quant_linear", x=x, bias=bias)
    return torch.ops.llamatelemetry.quant_linear.default(
        x, packed, format_name(format), n, bias, exact, scales, zeros, perm
    )


@register_fake("quant_linear")
def _(
    x: Tensor,
    packed: Tensor,
    format: str,
    n: int,
    bias: Tensor | None = None,
    exact: bool = False,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


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
