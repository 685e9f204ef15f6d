"""Linear layers, dense and quantised, and products of two matrices, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from llamatelemetry.ops.reference.quant import dequantize

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    y = _activated(functional.linear(x, weight, bias), activation)
    return y if residual is None else residual + y


def _activated(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    if activation.endswith("_and_mul"):
        gate, up = y.chunk(2, -1)
        return _ACTIVATIONS[activation.removesuffix("_and_mul")](gate) * up
    return _ACTIVATIONS[activation](y)


def rounded_activations(x: Tensor) -> Tensor:
    """x as the default mode of quant_linear sees it: int8 times a float32 scale per 32 values."""
    blocks = x.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / torch.tensor(127.0, device=x.device)
    usable = scale >= torch.finfo(torch.float32).tiny
    q = torch.where(usable, (blocks * (1 / scale)).round(), 0.0)
    poison = (blocks * 0).sum(-1, keepdim=True)  # NaN where a block holds NaN or infinity
    return (q.to(x.dtype) * (scale + poison).to(x.dtype)).flatten(-2)


def quant_linear(
    x: Tensor,
    data: Tensor,
    format: int | str,
    bias: Tensor | None,
    exact: bool,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """data: the rows that repack packed; scales and zeros [n, groups], of grouped formats."""
    x = x if perm is None else x[..., perm]
    weight = dequantize(data, format, scales, zeros).to(x.dtype)
    out = (x if exact else rounded_activations(x)) @ weight.T
    return _activated(out if bias is None else out + bias, activation)


def gemm(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    out = alpha * ((a.mT if trans_a else a) @ (b.mT if trans_b else b))
    return out + beta * c if beta and c is not None else out


def tensor_core_gemm(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return gemm(a.to(wide), b.to(wide), alpha, beta, trans_a, trans_b, c)


def tensor_core_gemm_int8(
    a: Tensor, b: Tensor, trans_a: bool = False, trans_b: bool = False
) -> Tensor:
    """In float64, whose whole numbers are exact to 2^53: torch has no int32 product on CUDA."""
    return gemm(a.double(), b.double(), 1.0, 0.0, trans_a, trans_b).to(torch.int32)


def scaled_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Products and sums in float64, which int8 and e4m3 fit exactly; then as the kernels round."""
    if block is not None:
        (n, k), wide = weight.shape, weight_scales.double().repeat_interleave(block, 0)
        columns = x_scales.double().repeat_interleave(block, -1)[..., :k]
        dense = weight.double() * wide.repeat_interleave(block, 1)[:n, :k]
        out = (x.double() * columns) @ dense.T
        return (out if bias is None else out + bias.double()).to(dtype)
    sums = (x.double() @ weight.double().T).float()
    out = x_scales * sums * weight_scales.flatten()
    return (out if bias is None else out + bias.float()).to(dtype)
