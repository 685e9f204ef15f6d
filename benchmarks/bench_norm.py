"""Row ops against torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main

from llamatelemetry import ops


def rms_norm(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = [(1, 576), (1, 4096), (128, 576), (1024, 4096)]
    if device.type == "cuda":
        shapes += [(4096, 4096), (8192, 8192)]
    for num_tokens, hidden_size in shapes[:2] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
            weight = torch.randn(hidden_size, device=device).to(dtype)
            yield Case(
                f"rms_norm {num_tokens}x{hidden_size} {str(dtype)[6:]}",
                inputs=(x, weight),
                ours=lambda x, w: ops.rms_norm(x, w, 1e-6),
                baselines={
                    "torch": lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6),
                },
                bytes_moved=2 * x.nbytes + weight.nbytes,
            )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    yield from rms_norm(device, quick)


if __name__ == "__main__":
    main("norm", cases)
