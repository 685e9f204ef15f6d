"""cos and sin of transformers' rotary modules, as the rotary op takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.models.spec import LayerSpec


def rope_angles(spec: LayerSpec, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as the rotary op takes them: one value per turned element."""
    layout = "pairs" if spec.rope == "interleaved" else "halves"
    if spec.rope_angles == layout:
        return cos, sin
    if spec.rope_angles != "once":
        half = cos.shape[-1] // 2
        step = 2 if spec.rope_angles == "pairs" else 1
        cos, sin = (x[..., : half * step : step] for x in (cos, sin))
    if layout == "pairs":
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def rows_of_angles(
    spec: LayerSpec, angles: tuple[Tensor, Tensor], batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [batch or 1, seqlen, width] as a row for each token of a batch."""
    cos, sin = rope_angles(spec, *angles)
    cos, sin = (x.expand(batch, -1, -1).flatten(0, 1).to(dtype) for x in (cos, sin))
    return cos, sin
