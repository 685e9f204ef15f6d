"""Whether a GPU has tensor cores, and torch's switches for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class TensorCoreConfig:
    """How torch uses tensor cores.

    Attributes:
        enabled: whether the GPU has any.
        dtype: the 16-bit type to compute in.
        allow_tf32: whether float32 products and convolutions may round their inputs to TF32.
        allow_fp16: whether sums of products in dtype may be split and added in dtype.

    Example:
        >>> TensorCoreConfig(allow_tf32=False)
        TensorCoreConfig(enabled=True, dtype=torch.float16, allow_tf32=False, allow_fp16=True)
    """

    enabled: bool = True
    dtype: torch.dtype = torch.float16
    allow_tf32: bool = True
    allow_fp16: bool = True

    def apply(self) -> None:
        """Sets torch's switches, on or off, as the fields say."""
        matmul = torch.backends.cuda.matmul
        matmul.allow_tf32 = self.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.allow_tf32
        if self.dtype == torch.bfloat16:
            matmul.allow_bf16_reduced_precision_reduction = self.allow_fp16
        else:
            matmul.allow_fp16_reduced_precision_reduction = self.allow_fp16


def check_dtype(op: str, dtype: torch.dtype, known: Sequence[torch.dtype]) -> None:
    """Refuses a dtype that an op does not know, with a RuntimeError that lists those it does."""
    if dtype not in known:
        names = ", ".join(str(one)[6:] for one in known)
        raise RuntimeError(f"{op}: dtype must be one of {names}, got {dtype}")


def check_tensor_core_support(device: int | torch.device = 0) -> bool:
    """Whether a GPU has tensor cores: compute capability 7.0 or more.

    Args:
        device: a CUDA device or its index.

    Returns:
        False also without CUDA, or without such a device.

    Example:
        >>> check_tensor_core_support()  # on a machine without a GPU
        False
    """
    capability = capability_of(device)
    return capability is not None and capability >= (7, 0)


def capability_of(device: int | torch.device = 0) -> tuple[int, int] | None:
    """The compute capability of a GPU; None without CUDA or without such a device."""
    if not torch.cuda.is_available():
        return None
    if not isinstance(device, int) and torch.device(device).type != "cuda":
        return None
    index = device if isinstance(device, int) else torch.device(device).index or 0
    if not 0 <= index < torch.cuda.device_count():
        return None
    return torch.cuda.get_device_capability(index)


def enable_tensor_cores(
    dtype: torch.dtype = torch.float16, allow_tf32: bool = True
) -> TensorCoreConfig:
    """Sets torch's switches for tensor cores, and unsets what is not allowed.

    Args:
        dtype: the type to compute in: float16, bfloat16, or float32 for TF32.
        allow_tf32: whether float32 products may round their inputs to TF32.

    Returns:
        What was set; enabled is False, and a warning says why, where there are no tensor cores.

    Raises:
        RuntimeError: for another dtype.

    Example:
        >>> config = enable_tensor_cores(allow_tf32=False)
        >>> torch.backends.cuda.matmul.allow_tf32
        False
    """
    check_dtype("enable_tensor_cores", dtype, DTYPES)
    config = TensorCoreConfig(check_tensor_core_support(), dtype, allow_tf32)
    config.apply()
    if not config.enabled:
        warnings.warn(f"enable_tensor_cores: {why_unsupported()}", stacklevel=1)
    return config


def why_unsupported(device: int | torch.device = 0) -> str:
    """A sentence for a device without tensor cores."""
    if not torch.cuda.is_available():
        return "there is no CUDA device, so there are no tensor cores to use"
    capability = capability_of(device)
    if capability is None:
        return f"there is no CUDA device {device}"
    return "tensor cores need compute capability 7.0, got {}.{}".format(*capability)
