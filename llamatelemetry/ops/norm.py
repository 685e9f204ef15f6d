"""Row ops: norms, rotary embedding, gated activations, softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm: ``x / sqrt(mean(x²) + eps) * weight``, accumulated in float32.

    x:       [..., hidden_size], float32, float16 or bfloat16; rows contiguous, evenly spaced
    weight:  [hidden_size], dtype and device of x
    Returns: shape and dtype of x, contiguous; normalised in float32, rounded, then multiplied, as
             transformers' modules do
    Raises:  RuntimeError naming the argument, the rule and the value
    Source:  Zhang & Sennrich 2019, arXiv:1910.07467
    """
    inference_only("rms_norm", x=x, weight=weight)
    return torch.ops.llamatelemetry.rms_norm.default(x, weight, eps)


@register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)
