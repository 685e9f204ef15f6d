"""quant_linear against torch's linear over dense weights: SmolLM2-135M's shapes on the CPU,
Llama-3-8B's on a GPU.

The limit for one row is a read of the packed bytes; for many rows torch's int8 matmul.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch.nn.functional import linear

from llamatelemetry.ops import QuantFormat, dequantize, quant_linear, repack

SHAPES = [
    (QuantFormat.Q4_1, 960, 576),  # merged q, k, v
    (QuantFormat.Q4_1, 576, 576),
    (QuantFormat.Q4_1, 3072, 576),  # merged gate, up
    (QuantFormat.Q4_1, 576, 1536),
    (QuantFormat.Q8_0, 49152, 576),  # the head
    *((format, 3072, 1536) for format in QuantFormat),
]


def random_rows(format: QuantFormat, n: int, k: int, device: torch.device) -> torch.Tensor:
    """GGUF rows; bytes below 64 keep every float16 scale finite and positive."""
    rows = torch.randint(0, 64, (n, format.row_bytes(k)), dtype=torch.uint8, device=device)
    if format.facts.scale_rule == "exponent":  # 2^-8: subnormal sums would be slow on the CPU
        rows.view(n, -1, format.block_bytes)[..., format.facts.fields["scale"][0]] = 120
    return rows


GPU_SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]  # QKV, O, gate+up, down
GPU_FORMATS = [
    QuantFormat.Q4_0,
    QuantFormat.Q4_K,
    QuantFormat.Q6_K,
    QuantFormat.Q8_0,
    QuantFormat.Q3_K,
    QuantFormat.IQ4_XS,
    QuantFormat.MXFP4,
]


def gpu_cases(quick: bool) -> Iterator[Case]:
    for format in GPU_FORMATS[:1] if quick else GPU_FORMATS:
        for n, k in GPU_SHAPES[:1] if quick else GPU_SHAPES:
            data = random_rows(format, n, k, torch.device("cuda"))
            weight = dequantize(data, format, torch.bfloat16)
            packed = repack(data, format)
            for m in (1, 16) if quick else (1, 4, 8, 16, 32, 64, 128):
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                yield Case(
                    f"{format.name} {k}->{n} m={m}",
                    inputs=(x, packed, weight),
                    ours=lambda x, packed, w, format=format, n=n: quant_linear(
                        x, packed, format, n
                    ),
                    baselines={"bfloat16 linear": lambda x, packed, w: linear(x, w)},
                    bytes_moved=packed.nbytes,
                )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if device.type == "cuda":
        yield from gpu_cases(quick)
        return
    for format, n, k in SHAPES[:2] if quick else SHAPES:
        data = random_rows(format, n, k, device)
        weight, packed = dequantize(data, format), repack(data, format)
        for m in (1, 8, 128):
            x = torch.randn(m, k, device=device)
            yield Case(
                f"{format.name} {k}->{n} m={m}",
                inputs=(x, packed, weight, weight.bfloat16()),
                ours=lambda x, packed, *_, format=format, n=n: quant_linear(x, packed, format, n),
                baselines={
                    "float32 linear": lambda x, packed, w, w16: linear(x, w),
                    "bfloat16 linear": lambda x, packed, w, w16: linear(x.bfloat16(), w16),
                },
                bytes_moved=packed.nbytes if m < 128 else None,
                flops=2 * m * n * k if m == 128 else None,
                flops_dtype=torch.int8,
            )


if __name__ == "__main__":
    main("quant_linear", cases)
