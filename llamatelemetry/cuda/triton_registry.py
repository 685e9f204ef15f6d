"""The registry of Triton kernels: what a name stands for, and how it is launched."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.cuda.triton_configs import KernelConfig, tuning_for
from llamatelemetry.extras import install_command

try:
    import triton
except ImportError:  # launches and the functions of triton_kernels then say so
    triton = None

TRITON_AVAILABLE: bool = triton is not None


class TritonKernel:
    """A Triton kernel with its name and launch configuration.

    Args:
        name: of the kernel.
        kernel_func: what ``@triton.jit`` made; None for a kernel that cannot be launched.
        config: how to launch; KernelConfig's defaults if None.

    Example:
        >>> TritonKernel("mine").config.block_size
        128
    """

    def __init__(
        self,
        name: str,
        kernel_func: Callable[..., Any] | None = None,
        config: KernelConfig | None = None,
    ) -> None:
        self.name = name
        self.kernel_func = kernel_func
        self.config = config or KernelConfig(name)

    def launch(self, *args: Any, grid: Any = None, **kwargs: Any) -> None:
        """Launches the kernel on the device of its first tensor.

        Args:
            *args: the kernel's own arguments.
            grid: programs, as Triton takes it; by default one for each block_size elements of the
                first tensor.
            **kwargs: further arguments of the kernel, or of the launch in place of the
                configuration's: BLOCK_SIZE (given only to a kernel that declares it), num_warps,
                num_stages.

        Raises:
            RuntimeError: there is no Triton or no kernel function.
        """
        if not TRITON_AVAILABLE:
            raise RuntimeError(
                f"{self.name}: Triton must be installed to launch a kernel, got none; "
                f"install it with: {install_command('triton')}, or take the one that torch brings"
            )
        if self.kernel_func is None:
            raise RuntimeError(
                f"{self.name}: kernel_func must be a @triton.jit function, got None; register one"
            )
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        if "BLOCK_SIZE" in _parameters_of(self.kernel_func):
            options["BLOCK_SIZE"] = self.config.block_size
        options |= kwargs
        tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if grid is None:
            if tensor is None:
                raise RuntimeError(
                    f"{self.name}: grid must be given where no argument is a tensor, got None"
                )
            block_size = options.get("BLOCK_SIZE", self.config.block_size)
            grid = (math.ceil(tensor.numel() / block_size),)
            if grid == (0,):
                return  # an empty grid is a launch error
        kernel: Any = self.kernel_func
        if tensor is None or not tensor.is_cuda:
            kernel[grid](*args, **options)
            return
        with torch.cuda.device(tensor.device):  # Triton launches on the current one
            kernel[grid](*args, **options)


def _parameters_of(kernel: Any) -> Sequence[str]:
    names: Sequence[str] | None = getattr(kernel, "arg_names", None)
    return names if names is not None else list(inspect.signature(kernel).parameters)


def _built_in() -> dict[str, TritonKernel]:
    names = ("add", "layernorm", "softmax")
    if not TRITON_AVAILABLE:
        return {name: TritonKernel(name) for name in names}
    from llamatelemetry.cuda import triton_sources

    return {name: TritonKernel(name, getattr(triton_sources, f"{name}_kernel")) for name in names}


_BUILT_IN = _built_in()
_registry = dict(_BUILT_IN)


def register_kernel(
    name: str, kernel_func: Callable[..., Any] | None, config: KernelConfig | None = None
) -> TritonKernel:
    """Puts a kernel in the registry; one of the same name is replaced, in its place in the order.

    Args:
        name: "add", "layernorm" or "softmax" to replace the kernel of a function here, which then
            gets the arguments that triton_sources declares; or a name of your own.
        kernel_func: what ``@triton.jit`` made.
        config: how to launch; KernelConfig's defaults if None.

    Returns:
        The registered kernel.

    Example:
        >>> kernel = register_kernel("mine", None, KernelConfig("mine", block_size=256))
        >>> list_kernels()
        ['add', 'layernorm', 'softmax', 'mine']
    """
    _registry[name] = TritonKernel(name, kernel_func, config)
    return _registry[name]


def get_kernel(name: str) -> TritonKernel | None:
    """The kernel registered under a name, or None.

    Example:
        >>> get_kernel("softmax").name
        'softmax'
        >>> get_kernel("unknown") is None
        True
    """
    return _registry.get(name)


def list_kernels() -> list[str]:
    """The registered names, in the order of their registration.

    Example:
        >>> list_kernels()
        ['add', 'layernorm', 'softmax']
    """
    return list(_registry)


def launchable(name: str, x: Tensor) -> TritonKernel | None:
    """The kernel registered now; None, with a warning, where it cannot run on x's device."""
    kernel = _registry[name]
    if TRITON_AVAILABLE and (x.is_cuda or is_interpreted(kernel.kernel_func)):
        return kernel
    why = (
        f"its tensors are on the {x.device.type}" if TRITON_AVAILABLE else "Triton is not installed"
    )
    warnings.warn(f"triton_{name}: {why}, so torch's own op runs", stacklevel=1)
    return None


def is_interpreted(kernel_func: Any) -> bool:
    """Whether a kernel was made under TRITON_INTERPRET=1 and so runs on the CPU."""
    return type(kernel_func).__name__ == "InterpretedFunction"


def launch_options(kernel: TritonKernel, x: Tensor, row: int | None) -> dict[str, int]:
    """The tuned row of this GPU for a kernel of ours, its block no wider than a row of x."""
    if kernel is not _BUILT_IN.get(kernel.name):
        return {}
    tuning = (
        tuning_for(kernel.name, torch.cuda.get_device_capability(x.device)) if x.is_cuda else None
    )
    config = kernel.config if tuning is None else tuning.config
    block_size = config.block_size
    if row is not None:
        block_size = min(block_size, 1 << (row - 1).bit_length())
    return {
        "BLOCK_SIZE": block_size,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
