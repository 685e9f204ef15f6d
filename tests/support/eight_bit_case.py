"""A small case of decode over a cache of 8 bits that append_kv_ has written."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry import ops


def eight_bit_decode(stored: torch.dtype, head_dim: int) -> tuple[object, ...]:
    """A function and its tensors, on the CPU: two sequences, the first of two queries."""

    def run(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, *where: Tensor) -> object:
        shape = (2, 13, 7, 2, head_dim)
        caches = torch.zeros(shape, device=q.device).to(stored)
        scales = torch.zeros(shape[:-1], device=q.device)
        ops.append_kv_(k, v, *caches, slots, *scales)
        named = {"k_scales": scales[0], "v_scales": scales[1]}
        return ops.paged_attention(q.bfloat16(), *caches, *where, max_seqlen_q=2, **named)

    return (
        run,
        torch.randn(3, 6, head_dim),
        *torch.randn(2, 91, 2, head_dim),
        torch.arange(91),
        torch.arange(13, dtype=torch.int32).view(1, 13).expand(2, -1).contiguous(),
        torch.tensor([80, 9], dtype=torch.int32),
        torch.tensor([0, 2, 3], dtype=torch.int32),
    )
