"""Linear layers over quantised weights in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops.reference.quant import dequantize


def rounded_activations(x: Tensor) -> Tensor:
    """x as the default mode of quant_linear sees it: int8 times a float32 scale per 32 values."""
    blocks = x.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / torch.tensor(127.0, device=x.device)
    usable = scale >= torch.finfo(torch.float32).tiny
    q = torch.where(usable, (blocks * (1 / scale)).round(), 0.0)
    poison = (blocks * 0).sum(-1, keepdim=True)  # NaN where a block holds NaN or infinity
    return (q.to(x.dtype) * (scale + poison).to(x.dtype)).flatten(-2)


def quant_linear(
    x: Tensor, data: Tensor, format: int | str, bias: Tensor | None, exact: bool
) -> Tensor:
    """data: the rows that repack packed."""
    out = (x if exact else rounded_activations(x)) @ dequantize(data, format).to(x.dtype).T
    return out if bias is None else out + bias
