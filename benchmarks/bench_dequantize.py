"""dequantize against gguf's numpy (CPU) or the same steps as torch ops (GPU), every format."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench_quant_linear import random_rows
from gguf import GGMLQuantizationType, quants
from harness import Case, main
from torch import Tensor

from llamatelemetry.ops import QuantFormat, dequantize, reference

# Looked up in a table that torch copies from the host, which no graph can hold.
IN_TABLES = (QuantFormat.IQ4_NL, QuantFormat.IQ4_XS, QuantFormat.MXFP4)


def in_numpy(data: Tensor, format: QuantFormat) -> Tensor:
    return torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[format.name]))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    on_cpu = device.type == "cpu"
    n, k = (576, 1536) if on_cpu else (14336, 4096)
    for format in [QuantFormat.Q4_1, QuantFormat.Q4_K] if quick else QuantFormat:
        in_torch = {} if format in IN_TABLES else {"torch": reference.dequantize}
        data = random_rows(format, n, k, device)
        for dtype in [torch.float32] if on_cpu else [torch.float32, torch.bfloat16]:
            yield Case(
                f"{format.name} {n}x{k} {str(dtype)[6:]}",
                inputs=(data, format),
                ours=lambda data, format, dtype=dtype: dequantize(data, format, dtype),
                baselines={"numpy": in_numpy} if on_cpu else in_torch,
                bytes_moved=data.nbytes + n * k * dtype.itemsize,
            )


if __name__ == "__main__":
    main("dequantize", cases)
