"""Whole packed tensors: repack and unpack against a copy, quant_embedding against a dense table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch.nn.functional import embedding

from llamatelemetry import ops

FORMATS = ("Q4_1", "Q8_0", "Q4_K")


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    n, k = (576, 1536) if device.type == "cpu" else (14336, 4096)
    for name in FORMATS[:1] if quick else FORMATS:
        row_bytes = ops.QuantFormat[name].row_bytes(k)
        # Bytes below 64 keep every float16 scale finite and positive.
        data = torch.randint(0, 64, (n, row_bytes), dtype=torch.uint8, device=device)
        packed = ops.repack(data, name)
        yield Case(
            f"repack {name} {n}x{k}",
            inputs=(data, packed),
            ours=lambda data, packed, name=name: ops.repack(data, name),
            baselines={"copy": lambda data, packed: packed.clone()},
            bytes_moved=data.nbytes + packed.nbytes,
        )
        yield Case(
            f"unpack {name} {n}x{k}",
            inputs=(data, packed),
            ours=lambda data, packed, name=name: ops.unpack(packed, name, n, k),
            baselines={"copy": lambda data, packed: data.clone()},
            bytes_moved=data.nbytes + packed.nbytes,
        )
        dense = ops.dequantize(data, name)
        for num_tokens in (1, 512):
            ids = torch.randint(0, n, (num_tokens,), device=device)
            yield Case(
                f"quant_embedding {name} {num_tokens} of {n}x{k}",
                inputs=(ids, packed, dense),
                ours=lambda ids, packed, dense, name=name: ops.quant_embedding(
                    ids, packed, name, n, k, torch.float32
                ),
                baselines={"torch dense": lambda ids, packed, dense: embedding(ids, dense)},
                bytes_moved=num_tokens * (row_bytes + 4 * k),
            )


if __name__ == "__main__":
    main("repack", cases)
