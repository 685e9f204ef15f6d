"""quant_linear with scales beside the codes, as GPTQ, AWQ, int8, float8 and bitsandbytes' become.

Llama-3-8B's shapes on a GPU, against torch's linear over dense bfloat16 weights, for four-bit codes
torch's own int4 product (tinygemm), and for int4 and int8 Humming where humming-kernels is
installed; all weights are rotated past the cache. The limit is a read of codes, scales and zero
points.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch
from bench_quant_linear import GPU_SHAPES
from harness import Case, main
from torch import Tensor
from torch.nn.functional import linear

from llamatelemetry.ops import quant_linear
from llamatelemetry.quantization.groups import GroupedWeight, pack_groups, unpack_groups

# None: a scale a row
FORMATS = [("S4", 128), ("U4", 128), ("S8", None), ("E4M3", 128), ("NF4", 64)]
GPU_ROWS = (1, 16, 32, 64, 128, 256, 2048)
ROTATED_BYTES = 256 << 20  # of a baseline's copies together, at least
MAX_TINYGEMM_ROWS = 256  # it reads the weights again for each 16


def random_weight(format: str, n: int, k: int, group: int | None, device: str) -> GroupedWeight:
    codes = torch.randint(-8, 8, (n, k), device=device, dtype=torch.int8)
    if format in ("U4", "NF4"):
        codes = (codes + 8).view(torch.uint8)
    elif format == "E4M3":
        codes = codes.to(torch.float8_e4m3fn)
    scales = 0.01 + 0.01 * torch.rand(n, k // (group or k), device=device)
    zeros = torch.full_like(scales, 8, dtype=torch.uint8) if format == "U4" else None
    return pack_groups(codes, format, scales.half(), zeros)


def rotated(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    copies = 1 + ROTATED_BYTES // sum(tensor.nbytes for tensor in tensors)
    clones = [tuple(tensor.clone() for tensor in tensors) for _ in range(copies)]
    return itertools.cycle([tensors, *clones])


def tinygemm(weight: Tensor, group: int) -> Callable[..., Tensor]:
    """torch's product over the codes and scales that weight, of random_weight's four bits, has."""
    n, k = weight.shape
    groups = weight.view(n, k // group, group)
    scales = groups.abs().amax(2, keepdim=True) / 8  # of codes -8 to 7 a group of 128 has -8
    codes = (groups / scales).round().clamp(-8, 7).view(n, k).add(8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale_and_zero = torch.stack([scales.squeeze(2).T, torch.zeros_like(scales.squeeze(2).T)], 2)
    copies = rotated(packed, scale_and_zero.to(torch.bfloat16).contiguous())

    def product(x: Tensor, *_: Tensor) -> Tensor:
        codes, scales = next(copies)
        return torch.ops.aten._weight_int4pack_mm(x, codes, group, scales)

    return product


def humming(weight: Tensor, format: str, group: int | None) -> Callable[..., Tensor] | None:
    """Humming's layer over weight, which it quantises itself; None without it or its format."""
    configs = {"S4": {"dtype": "int4", "group_size": group}, "S8": {"dtype": "int8"}}
    if format not in configs or importlib.util.find_spec("humming") is None:
        return None
    from humming.layer import HummingLayer

    n, k = weight.shape
    bytes_of_codes = n * k // (2 if format == "S4" else 1)
    layers = []
    for _ in range(1 + ROTATED_BYTES // bytes_of_codes):
        layer = HummingLayer(
            shape_n=n, shape_k=k, weight_config=configs[format], torch_dtype=weight.dtype
        ).cuda()
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    copies = itertools.cycle(layers)

    def product(x: Tensor, *_: Tensor) -> Tensor:
        return next(copies)(x)

    return product


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    on_cpu = device.type == "cpu"
    shapes = [(3072, 1536)] if on_cpu else GPU_SHAPES
    dtype = torch.float32 if on_cpu else torch.bfloat16
    for format, group in FORMATS[: 1 if quick else None]:
        for n, k in shapes[: 1 if quick else None]:
            w = random_weight(format, n, k, group, device.type)
            weight = unpack_groups(w, n, k).to(dtype)
            dense = rotated(weight)
            tiny = None
            if not on_cpu and group and format in ("S4", "U4"):
                tiny = tinygemm(unpack_groups(w, n, k), group)
            hummings = None if on_cpu else humming(weight, format, group)

            def torchs(
                x: Tensor, *_: Tensor, dense: Iterator[tuple[Tensor, ...]] = dense
            ) -> Tensor:
                return linear(x, *next(dense))

            def ours(
                x: Tensor, packed: Tensor, *sides: Tensor, format: str = format, n: int = n
            ) -> Tensor:
                return quant_linear(x, packed, format, n, None, False, *sides)

            tensors = [w.packed, w.scales] + ([] if w.zeros is None else [w.zeros])
            for m in (1, 16) if quick else (1, 8, 128) if on_cpu else GPU_ROWS:
                baselines: dict[str, Callable[..., Tensor]] = {f"{str(dtype)[6:]} linear": torchs}
                if tiny and m <= MAX_TINYGEMM_ROWS:
                    baselines["tinygemm"] = tiny
                if hummings:
                    baselines["humming"] = hummings
                yield Case(
                    f"{format} {f'g{group}' if group else 'column'} {k}->{n} m={m}",
                    inputs=(torch.randn(m, k, device=device).to(dtype), *tensors),
                    ours=ours,
                    baselines=baselines,
                    bytes_moved=sum(tensor.nbytes for tensor in tensors),
                )


if __name__ == "__main__":
    main("group_linear", cases)
