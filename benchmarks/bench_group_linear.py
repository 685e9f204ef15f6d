"""quant_linear with scales beside the codes, as GPTQ, AWQ, int8, float8 and bitsandbytes' become.

Llama-3-8B's shapes on a GPU, against torch's linear over dense bfloat16 weights; ours and torch's
weights are each rotated past the cache. The limit is a read of codes, scales and zero points.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from bench_quant_linear import GPU_SHAPES
from harness import Case, main
from torch import Tensor
from torch.nn.functional import linear

from llamatelemetry.ops import quant_linear
from llamatelemetry.quantization.groups import GroupedWeight, pack_groups, unpack_groups

# None: a scale a row
FORMATS = [("S4", 128), ("U4", 128), ("S8", None), ("E4M3", 128), ("NF4", 64)]
DENSE_BYTES = 256 << 20  # of the dense copies together, at least


def random_weight(format: str, n: int, k: int, group: int | None, device: str) -> GroupedWeight:
    codes = torch.randint(-8, 8, (n, k), device=device, dtype=torch.int8)
    if format in ("U4", "NF4"):
        codes = (codes + 8).view(torch.uint8)
    elif format == "E4M3":
        codes = codes.to(torch.float8_e4m3fn)
    scales = 0.01 + 0.01 * torch.rand(n, k // (group or k), device=device)
    zeros = torch.full_like(scales, 8, dtype=torch.uint8) if format == "U4" else None
    return pack_groups(codes, format, scales.half(), zeros)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    on_cpu = device.type == "cpu"
    shapes = [(3072, 1536)] if on_cpu else GPU_SHAPES
    dtype = torch.float32 if on_cpu else torch.bfloat16
    for format, group in FORMATS[: 1 if quick else None]:
        for n, k in shapes[: 1 if quick else None]:
            w = random_weight(format, n, k, group, device.type)
            weight = unpack_groups(w, n, k).to(dtype)
            copies = 1 + DENSE_BYTES // weight.nbytes
            dense = itertools.cycle([weight, *(weight.clone() for _ in range(copies))])

            def torchs(x: Tensor, *_: Tensor, dense: Iterator[Tensor] = dense) -> Tensor:
                return linear(x, next(dense))

            def ours(
                x: Tensor, packed: Tensor, *sides: Tensor, format: str = format, n: int = n
            ) -> Tensor:
                return quant_linear(x, packed, format, n, None, False, *sides)

            tensors = [w.packed, w.scales] + ([] if w.zeros is None else [w.zeros])
            for m in (1, 16) if quick else (1, 8, 128) if on_cpu else (1, 16, 32, 64, 256):
                yield Case(
                    f"{format} {f'g{group}' if group else 'column'} {k}->{n} m={m}",
                    inputs=(torch.randn(m, k, device=device).to(dtype), *tensors),
                    ours=ours,
                    baselines={f"{str(dtype)[6:]} linear": torchs},
                    bytes_moved=sum(tensor.nbytes for tensor in tensors),
                )


if __name__ == "__main__":
    main("group_linear", cases)
