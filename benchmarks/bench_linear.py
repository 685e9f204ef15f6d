"""linear against torch's: SmolLM2-135M's shapes on the CPU, Llama-3-8B's on a GPU.

The limit is a read of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor
from torch.nn import functional

from llamatelemetry.ops import linear

SHAPES = {  # name: n, k
    "cpu": {"QKV": (960, 576), "gate+up": (3072, 576), "down": (576, 1536), "head": (49152, 576)},
    "cuda": {
        "QKV": (6144, 4096),
        "O": (4096, 4096),
        "gate+up": (28672, 4096),
        "down": (4096, 14336),
    },
}
ROWS = {"cpu": (1, 4, 16), "cuda": (1, 2, 4, 8, 16)}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = functional.linear(x, weight).chunk(2, -1)
    return functional.silu(gate) * up


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = SHAPES[device.type]
    for dtype in DTYPES[device.type]:
        for name, (n, k) in list(shapes.items())[: 1 if quick else None]:
            weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
            for m in ROWS[device.type][: 1 if quick else None]:
                x = torch.randn(m, k, device=device).to(dtype)
                title = f"{name} {k}->{n} m={m} {str(dtype)[6:]}"
                yield Case(
                    title,
                    inputs=(x, weight),
                    ours=lambda x, w: linear(x, w),
                    baselines={"torch": lambda x, w: functional.linear(x, w)},
                    bytes_moved=weight.nbytes,
                )
                if name == "gate+up":
                    yield Case(
                        f"{title}, silu_and_mul",
                        inputs=(x, weight),
                        ours=lambda x, w: linear(x, w, activation="silu_and_mul"),
                        baselines={"torch": gated},
                        bytes_moved=weight.nbytes,
                    )


if __name__ == "__main__":
    main("linear", cases)
