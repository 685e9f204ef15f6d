"""The semantics of every op in plain PyTorch: the tests' oracle, and what to read first.

Each function computes in the dtype it is given; tests pass float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
