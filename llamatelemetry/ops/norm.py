"""Row ops: norms, rotary embedding, gated activations, softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, weight_offset: float = 0.0) -> Tensor:
    """Root-mean-square norm: ``x / sqrt(mean(x²) + eps) * (weight + weight_offset)``, in float32.

    Args:
        x: [..., hidden_size], float32, float16 or bfloat16; rows contiguous, evenly spaced
        weight: [hidden_size], dtype and device of x
        weight_offset: 1 where a module stores its weight less 1 (Gemma)

    Returns:
        shape and dtype of x, contiguous; normalised in float32, rounded, then multiplied, as
        transformers' modules do; with an offset rounded once, after the product

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Zhang & Sennrich 2019, arXiv:1910.07467
    """
    inference_only("rms_norm", x=x, weight=weight)
    return torch.ops.llamatelemetry.rms_norm.default(x, weight, eps, weight_offset)


@register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    return x.new_empty(x.shape)


def fused_add_rms_norm_(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, weight_offset: float = 0.0
) -> None:
    """Adds and norms in one pass: ``residual += x; x = rms_norm(residual, weight, eps)``.

    Args:
        x, residual: [..., hidden_size], float32, float16 or bfloat16, both written in place; rows
            contiguous, evenly spaced, each at its own distance, none sharing memory. The sum is
            rounded to the dtype before it is normed
        weight: [hidden_size], dtype and device of x
        weight_offset: as in rms_norm

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Zhang & Sennrich 2019, arXiv:1910.07467
    """
    inference_only("fused_add_rms_norm_", x=x, residual=residual, weight=weight)
    torch.ops.llamatelemetry.fused_add_rms_norm_.default(x, residual, weight, eps, weight_offset)


@register_fake("fused_add_rms_norm_")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> None:
    return None


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
) -> Tensor:
    """Layer norm: ``(x - mean(x)) / sqrt(variance(x) + eps) * (weight + weight_offset) + bias``, in
    float32.

    Args:
        x: [..., hidden_size], float32, float16 or bfloat16; rows contiguous, evenly spaced
        weight, bias: [hidden_size], dtype and device of x; each may be left out
        weight_offset: 1 where a module stores its weight less 1 (Nemotron); nothing without weight

    Returns:
        shape and dtype of x, contiguous; rounded once

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Ba, Kiros & Hinton 2016, arXiv:1607.06450
    """
    inference_only("layer_norm", x=x, weight=weight, bias=bias)
    return torch.ops.llamatelemetry.layer_norm.default(x, weight, bias, eps, weight_offset)


@register_fake("layer_norm")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
) -> Tensor:
    return x.new_empty(x.shape)


def rotary_embedding_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Turns q and k by their positions: ``x[:rotary_dim] = x * cos + rotate_half(x) * sin``.

    Args:
        q: [num_tokens, num_heads_q, head_dim], float32, float16 or bfloat16, written in place; any
            token and head strides (a slice of a merged qkv), last dimension contiguous
        k: [num_tokens, num_heads_kv, head_dim], likewise
        cos, sin: [positions, rotary_dim], dtype of q, one value per turned element, as the rotary
            modules of transformers give them; rotary_dim even and <= head_dim, the elements past it
            stay
        positions: [num_tokens] int64 or int32, the row of cos and sin of each token; None: row t is
            token t's. A position outside the table gives NaN
        interleaved: rotate_half pairs x[2i] with x[2i + 1] (GPT-J, Cohere, GLM) rather than x[i]
            with x[i + rotary_dim / 2] (GPT-NeoX, Llama). Where a module repeats its angles in
            halves nevertheless (GLM), pass ``cos[:, : rotary_dim // 2].repeat_interleave(2, -1)``

    Rounds each product to the dtype, then their sum, as transformers' apply_rotary_pos_emb.

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Su et al. 2021, arXiv:2104.09864
    """
    inference_only("rotary_embedding_", q=q, k=k, cos=cos, sin=sin)
    torch.ops.llamatelemetry.rotary_embedding_.default(q, k, cos, sin, positions, interleaved)


@register_fake("rotary_embedding_")
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> None:
    return None


def silu_and_mul(x: Tensor) -> Tensor:
    """Gated SiLU: ``gate / (1 + exp(-gate)) * up`` with ``gate, up = x.chunk(2, -1)``.

    Args:
        x: [..., 2 * size], float32, float16 or bfloat16; rows contiguous, evenly spaced

    Returns:
        [..., size], dtype of x, contiguous; the activation is computed in float32 and rounded
        before the product, as ``act_fn(gate) * up`` rounds it

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Shazeer 2020, arXiv:2002.05202
    """
    inference_only("silu_and_mul", x=x)
    return torch.ops.llamatelemetry.silu_and_mul.default(x)


def gelu_and_mul(x: Tensor) -> Tensor:
    """Gated GELU: ``gate / 2 * (1 + erf(gate / sqrt(2))) * up``; shapes and rounding as
    silu_and_mul.

    Args:
        x: [..., 2 * size], float32, float16 or bfloat16; rows contiguous, evenly spaced

    Returns:
        [..., size], dtype of x, contiguous

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Hendrycks & Gimpel 2016, arXiv:1606.08415
    """
    inference_only("gelu_and_mul", x=x)
    return torch.ops.llamatelemetry.gelu_and_mul.default(x)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """Gated GELU by its tanh form: ``gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 *
    gate³))) * up``; shapes and rounding as silu_and_mul.

    Args:
        x: [..., 2 * size], float32, float16 or bfloat16; rows contiguous, evenly spaced

    Returns:
        [..., size], dtype of x, contiguous

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Hendrycks & Gimpel 2016, arXiv:1606.08415
    """
    inference_only("gelu_tanh_and_mul", x=x)
    return torch.ops.llamatelemetry.gelu_tanh_and_mul.default(x)


@register_fake("silu_and_mul")
@register_fake("gelu_and_mul")
@register_fake("gelu_tanh_and_mul")
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def activation(x: Tensor, kind: str) -> Tensor:
    """An activation of each element, as of MLPs without a gate.

    Args:
        x: [..., size], float32, float16 or bfloat16; rows contiguous, evenly spaced
        kind: "relu": ``max(x, 0)``; "relu2": its square; "silu": ``x / (1 + exp(-x))``; "gelu":
            ``x / 2 * (1 + erf(x / sqrt(2)))``; "gelu_tanh": ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x +
            0.044715 * x³)))``

    Returns:
        shape and dtype of x, contiguous; computed in float32 and rounded once

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        So et al. 2021, arXiv:2109.08668 (relu2); Hendrycks & Gimpel 2016, arXiv:1606.08415
    """
    inference_only("activation", x=x)
    return torch.ops.llamatelemetry.activation.default(x, kind)


@register_fake("activation")
def _(x: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape)


def softmax(x: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax over the last dimension: ``exp(y - max(y)) / sum(exp(y - max(y)))``,
    ``y = x / temperature``, in float32.

    Args:
        x: [..., size], float32, float16 or bfloat16; rows contiguous, evenly spaced
        temperature: > 0

    Returns:
        shape and dtype of x, contiguous; a row with a NaN, an inf or only -inf is all NaN, as in
        torch, and changes no other

    Raises:
        RuntimeError: naming the argument, the rule and the value
    """
    inference_only("softmax", x=x)
    return torch.ops.llamatelemetry.softmax.default(x, temperature)


@register_fake("softmax")
def _(x: Tensor, temperature: float) -> Tensor:
    return x.new_empty(x.shape)
