"""The GPU kernels that something runs, how long each takes, and whose they are."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

# Parts of the names of kernels -> the library that they are of; the first that fits.
_LIBRARIES = (
    ("llamatelemetry", "llamatelemetry"),
    ("cutlass", "CUTLASS"),
    ("cudnn", "cuDNN"),
    ("flash", "FlashAttention"),
    ("fmha", "FlashAttention"),
    ("cublas", "cuBLAS"),
    ("nvjet", "cuBLAS"),
    ("gemm", "cuBLAS"),
    ("gemv", "cuBLAS"),
    ("splitkreduce", "cuBLAS"),
)
# torch's own kernels begin so, arange's in the second way; its copy of CUB is at_cuda_detail.
_OF_TORCH = ("at::native::", "(anonymous namespace)::")
_COPY_OF_THE_DRIVER = "memcpy32_post"  # what runs for a small cudaMemcpyAsync
_EXPECTED = {"triton": ("Triton", "torch")}


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a run.

    Attributes:
        name: as the profiler has it.
        maker: "Triton" (ours in Triton), "torch" (its own, at::native), "llamatelemetry" (ours in
            CUDA), "cuBLAS", "cuDNN", "CUTLASS", "FlashAttention" or "unknown".
        calls: in the run.
        us: microseconds of all of them.
        share: of all kernels' time, 0 to 1.
    """

    name: str
    maker: str
    calls: int
    us: float
    share: float


@cache
def _triton_names() -> frozenset[str]:
    """Names of the kernels in llamatelemetry/triton_ops; none where Triton is not installed."""
    try:
        package = importlib.import_module("llamatelemetry.triton_ops.kernels")
        modules = [
            importlib.import_module(f"{package.__name__}.{info.name}")
            for info in pkgutil.iter_modules(package.__path__)
        ]
    except ModuleNotFoundError:
        return frozenset()
    return frozenset(name for module in modules for name in vars(module) if "_kernel" in name)


def maker_of(name: str) -> str:
    """Whose a kernel is, by its name; see KernelTime.maker."""
    if name in _triton_names():
        return "Triton"
    lower = name.lower()
    for part, library in _LIBRARIES:
        if part in lower:
            return library
    is_torch_s = name.removeprefix("void ").startswith(_OF_TORCH) and "at::" in name
    if is_torch_s or "at_cuda_detail::" in name or name == _COPY_OF_THE_DRIVER:
        return "torch"
    return "unknown"


def kernels_of(run: Callable[[], Any]) -> list[KernelTime]:
    """The kernels that a function runs on the current GPU, the longest first; copies are none."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = [
        (event.key, event.count, event.self_device_time_total)
        for event in profiler.key_averages()
        if event.self_device_time_total > 0 and not event.key.startswith(("Memcpy", "Memset"))
    ]
    total = sum(us for _, _, us in found)
    kernels = [KernelTime(name, maker_of(name), n, us, us / total) for name, n, us in found]
    return sorted(kernels, key=lambda kernel: -kernel.us)


def why_not_only(expected: str, kernels: Iterable[KernelTime]) -> str | None:
    """Why a run's kernels are not those that were expected; None where they are.

    Args:
        expected: "triton": every kernel is Triton's or torch's own, and one at least Triton's.

    Returns:
        A sentence that names each other kernel and whose it is.
    """
    found, makers = list(kernels), _EXPECTED[expected]
    others = [kernel for kernel in found if kernel.maker not in makers]
    if others:
        names = "; ".join(f"{kernel.name:.120} ({kernel.maker})" for kernel in others)
        return f"{len(others)} of {len(found)} kernels must be {' or '.join(makers)}'s, got {names}"
    if not any(kernel.maker == makers[0] for kernel in found):
        return f"one kernel at least must be {makers[0]}'s, got none of {len(found)}"
    return None
