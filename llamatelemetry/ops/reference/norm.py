"""Row ops in plain PyTorch: norms, rotary embedding, activations, softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + weight_offset)


def fused_add_rms_norm_(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> None:
    residual += x
    x.copy_(rms_norm(residual, weight, eps, weight_offset))


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * (weight + weight_offset)
    return out if bias is None else out + bias


def rotary_embedding_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> None:
    rows = torch.arange(q.shape[0], device=q.device) if positions is None else positions
    cos, sin = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)
    for x in (q, k):
        turned = x[..., : cos.shape[-1]]
        if interleaved:
            half = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            half = torch.cat([-second, first], -1)
        turned.copy_(turned * cos + half * sin)


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def gelu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate / 2 * (1 + torch.erf(gate / 2**0.5)) * up


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate / 2 * (1 + torch.tanh(inner)) * up


def activation(x: Tensor, kind: str) -> Tensor:
    if kind in ("relu", "relu2"):
        return torch.where(x < 0, 0.0, x) ** (2 if kind == "relu2" else 1)
    ones = torch.ones_like(x)
    gated = {"silu": silu_and_mul, "gelu": gelu_and_mul, "gelu_tanh": gelu_tanh_and_mul}
    return gated[kind](torch.cat([x, ones], -1))


def softmax(x: Tensor, temperature: float) -> Tensor:
    y = x / temperature
    power = torch.exp(y - y.amax(-1, keepdim=True))
    return power / power.sum(-1, keepdim=True)


def quantize_rows(x: Tensor, dtype: torch.dtype, block: int | None = None) -> tuple[Tensor, Tensor]:
    if block is not None:
        size = x.shape[-1]
        padded = functional.pad(x, (0, -size % block)).unflatten(-1, (-1, block))
        q, scales = quantize_rows(padded, dtype)
        return q.flatten(-2)[..., :size].contiguous(), scales.squeeze(-1)
    wide = x.float()
    limit = torch.tensor(127.0 if dtype == torch.int8 else 448.0, device=x.device)
    scales = (
        wide.abs().amax(-1, keepdim=True) / limit
        if x.shape[-1]
        else wide.new_zeros((*x.shape[:-1], 1))
    )
    usable = scales >= torch.finfo(torch.float32).tiny  # which NaN is not
    usable &= scales.isfinite()
    q = torch.where(usable, wide * (1 / scales), 0.0)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return (q.round() if dtype == torch.int8 else q.clamp(-448, 448)).to(dtype), scales


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    return quantize_rows(rms_norm(x, weight, eps, weight_offset), dtype, block)


def fused_add_rms_norm_quantize_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    return rms_norm_quantize(residual.add_(x), weight, dtype, eps, weight_offset, block)


def silu_and_mul_quantize(
    x: Tensor, dtype: torch.dtype, block: int | None = None
) -> tuple[Tensor, Tensor]:
    return quantize_rows(silu_and_mul(x), dtype, block)
