"""Random GGUF rows whose weights are of the size that models have."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops import QuantFormat
from llamatelemetry.ops.quant import GGUF_BLOCKS

# Where a block keeps its float16 scales, as an index of halves.
_SCALES = {
    QuantFormat.Q4_1: (0, 1),
    QuantFormat.Q5_1: (0, 1),
    QuantFormat.Q4_K: (0, 1),
    QuantFormat.Q5_K: (0, 1),
    QuantFormat.Q6_K: (104,),
}


def gguf_rows(format: QuantFormat, n: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """[n, row_bytes]: codes of random bits, scales normally distributed."""
    weights, num_bytes = GGUF_BLOCKS[format]
    blocks = torch.randint(0, 256, (n, k // weights, num_bytes), dtype=torch.uint8)
    for half in _SCALES.get(format, (0,)):
        scale = (0.01 * torch.randn(n, k // weights, 1)).half()
        blocks[..., 2 * half : 2 * half + 2] = scale.view(torch.uint8)
    return blocks.flatten(1).to(device)
