"""gemm, tensor_core_gemm and tensor_core_gemm_int8 against torch's products, of square matrices.

The limit is torch's product of 8192 x 8192, on the CPU of 1024 x 1024.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor

from llamatelemetry.ops import gemm, tensor_core_gemm, tensor_core_gemm_int8

SIZES = {"cpu": (256, 512), "cuda": (1024, 2048, 4096, 8192)}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}
MOST_FLOAT32 = 4096  # on a GPU: the next size takes 22 ms a call
LAYOUTS = {"a b": (False, False), "a bT": (False, True), "aT b": (True, False)}


def torch_gemm(trans_a: bool, trans_b: bool):
    return lambda a, b: (a.T if trans_a else a) @ (b.T if trans_b else b)


def floats(device: torch.device, size: int) -> Iterator[Case]:
    for dtype in DTYPES[device.type]:
        if dtype == torch.float32 and size > MOST_FLOAT32:
            continue
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        all_layouts = device.type == "cuda" and dtype == torch.bfloat16
        for name, (trans_a, trans_b) in list(LAYOUTS.items())[: None if all_layouts else 1]:
            yield Case(
                f"gemm {name} {size} {str(dtype)[6:]}",
                inputs=(a, b),
                ours=lambda a, b, ta=trans_a, tb=trans_b: gemm(a, b, trans_a=ta, trans_b=tb),
                baselines={"torch": torch_gemm(trans_a, trans_b)},
                flops=2 * size**3,
                flops_dtype=dtype,
            )


def wide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for size in SIZES[device.type][: 1 if quick else None]:
        yield from floats(device, size)
        a, b = (torch.randn(size, size, device=device).half() for _ in range(2))
        yield Case(
            f"tensor_core_gemm {size} float16",
            inputs=(a, b),
            ours=lambda a, b: tensor_core_gemm(a, b),
            baselines={"torch": wide},
            flops=2 * size**3,
            flops_dtype=torch.float16,
        )
        a, b = (
            torch.randint(-127, 128, (size, size), device=device).to(torch.int8) for _ in range(2)
        )
        for name, transposed in {"a bT": True, "a b": False}.items():
            yield Case(
                f"tensor_core_gemm_int8 {name} {size}",
                inputs=(a, b),
                ours=lambda a, b, t=transposed: tensor_core_gemm_int8(a, b, trans_b=t),
                baselines={"torch": lambda a, b, t=transposed: torch._int_mm(a, b.T if t else b)},
                flops=2 * size**3,
                flops_dtype=torch.int8,
            )


if __name__ == "__main__":
    main("gemm", cases)
