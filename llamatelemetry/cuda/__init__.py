"""CUDA graphs, Triton kernels and tensor cores: the names are loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "graphs": (
        "CUDAGraph",
        "GraphCaptureConfig",
        "GraphPool",
        "capture_graph",
        "disable_cuda_graphs",
        "enable_cuda_graphs",
        "replay_graph",
    ),
    "triton_kernels": (
        "TRITON_AVAILABLE",
        "KernelConfig",
        "TritonKernel",
        "get_kernel",
        "list_kernels",
        "register_kernel",
        "triton_add",
        "triton_layernorm",
        "triton_softmax",
    ),
    "tensor_core": (
        "TensorCoreConfig",
        "TensorCoreMatMul",
        "check_tensor_core_support",
        "enable_amp",
        "enable_tensor_cores",
        "get_tensor_core_info",
        "matmul_tensor_core",
        "optimize_for_tensor_cores",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_MODULE_OF})
