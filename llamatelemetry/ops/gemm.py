"""Linear layers, dense and over quantised weights."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake
from llamatelemetry.ops.formats import QuantFormat, format_name

GATED = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
ACTIVATIONS = (None, "relu", "relu2", "silu", "gelu", "gelu_tanh", *GATED)


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
    columns = _columns("linear", "weight", weight.shape[0], activation)
    return x.new_empty((*x.shape[:-1], columns))


def _columns(op: str, argument: str, n: int, activation: str | None) -> int:
    """Of the result; refuses what the op refuses, in its words."""
    if activation not in ACTIVATIONS:
        names = ", ".join(map(str, ACTIVATIONS))
        raise RuntimeError(f"{op}: activation must be one of {{{names}}}, got {activation}")
    if activation not in GATED:
        return n
    if n % 2:
        raise RuntimeError(
            f"{op}: {argument} must have an even number of rows for {activation} (gate, then up), "
            f"got {n}"
        )
    return n // 2


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
    activation: str | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias)`` with the weight packed in 8 bits or fewer; sums in
    float32.

    On CUDA values of bfloat16 x past about 1e34 may give inf or NaN where the result would be
    finite: kernels that scale sums of x times codes, as those for few rows do, pass float32's
    range.

    Args:
        x: [..., k], float32, float16 or bfloat16; rows contiguous, evenly spaced.
        packed: What repack returns for the weight's [n, k].
        format: A QuantFormat, its name or its GGML type number; or "U4", "S4", "S8", "E4M3", "NF4"
            or "FP4", whose scales stand beside the codes: llamatelemetry.quantization.groups packs
            them.
        n: Rows of the weight.
        bias: [n], dtype and device of x.
        exact: Whether x stays as it is. Otherwise the CPU rounds it to 8 bits in blocks of 32
            (``scale = absmax / 127``), which is several times faster; a block with NaN or infinity
            gives NaN. CUDA never rounds x; from 17 rows on of 16-bit x on Hopper, of some formats
            and shapes from 9 on, elsewhere for many rows (past 32 or 64 of 16-bit x, past 8 of
            float32), it rounds the weights to the dtype of x, but on Hopper not those of "U4" and
            "S4" in groups of 128 or more at 17 to 64 rows, in some shapes at up to 256; those of
            "NF4" and "FP4" for any number of rows of 16-bit x where capability is 8.0 or more.
            "E4M3", "NF4" and "FP4" are always exact on the CPU.
        scales: [ceil(n / 16), groups, 16] float32, for the formats named above alone: 16 rows side
            by side. A group is 32, 64, 128 or all weights of a row.
        zeros: Likewise uint8, for "U4": ``weight = scale * (code - zero)``.
        perm: [k] int32, for the formats with scales: column j of the weight meets column perm[j] of
            x, as where a quantiser sorted the columns (GPTQ's act-order). Where perm names no
            column x counts as 0.
        activation: As in linear. On CUDA the stream kernel (the formats with `stream` in
            docs/adding_a_format.md, 16-bit x, mostly up to 16 rows) applies it, of gates where n is
            a multiple of 32; elsewhere another launch does.

    Returns:
        [..., n] in the dtype of x, [..., n / 2] where gated. On the CPU a row does not depend on
        the other rows, nor on how many there are.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        The blocks are GGUF's; 8-bit activations in blocks of 32 are ggml's Q8_0.
    """
    inference_only("quant_linear", x=x, bias=bias)
    return torch.ops.llamatelemetry.quant_linear.default(
        x, packed, format_name(format), n, bias, exact, scales, zeros, perm, activation
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
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _columns("quant_linear", "packed", n, activation)))
