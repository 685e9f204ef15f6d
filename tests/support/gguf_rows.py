"""Random GGUF rows whose weights are of the size that models have."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops import QuantFormat


def gguf_rows(format: QuantFormat, n: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """[n, row_bytes]: codes of random bits, scales normally distributed (exponents: near 2^-7)."""
    shape = (n, k // format.block_size)
    blocks = torch.randint(0, 256, (*shape, format.block_bytes), dtype=torch.uint8)
    for field in ("scale", "min"):
        if field in format.facts.fields:
            offset, num_bytes = format.facts.fields[field]
            if num_bytes == 1:
                blocks[..., offset] = torch.randint(119, 123, shape, dtype=torch.uint8)
                continue
            # 6-bit factors of d times codes of 7 bits make weights of thousands of d.
            size = 0.001 if format.facts.scale_rule == "sub_block32_six" else 0.01
            scale = (size * torch.randn(*shape, 1)).half()
            blocks[..., offset : offset + num_bytes] = scale.view(torch.uint8)
    return blocks.flatten(1).to(device)
