"""What every op here shares: where it may run, and checks that refuse in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llamatelemetry.triton_ops.kernels.norm import rms_norm_kernel

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
IS_INTERPRETED = type(rms_norm_kernel).__name__ == "InterpretedFunction"


def why_not_on(device: torch.device | str) -> str | None:
    """Why the kernels cannot run on a device; None where they can."""
    kind = torch.device(device).type
    if kind == "cuda" or (kind == "cpu" and IS_INTERPRETED):
        return None
    return (
        "Triton's kernels must have a GPU, or a CPU where TRITON_INTERPRET=1 was set before Triton "
        f"was imported, got a {kind}"
    )


def why_no_e4m3_on(device: torch.device) -> str | None:
    """Why Triton cannot make or multiply e4m3 on a GPU; None where it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return None
    return "e4m3 must have compute capability 8.9 or later, got {}.{}".format(*capability)


def check(op: str, name: str, x: Tensor, like: Tensor | None = None) -> None:
    """Refuses a tensor that is not float32, float16 or bfloat16, where a kernel runs, or not like
    another one.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    if x.dtype not in FLOATS or (like is not None and x.dtype != like.dtype):
        rule = "float32, float16 or bfloat16" if like is None else f"{like.dtype} as x"
        raise RuntimeError(f"{op}: {name} must be {rule}, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise RuntimeError(f"{op}: {name} must be on {like.device} as x, got {x.device}")
    if like is None and (reason := why_not_on(x.device)) is not None:
        raise RuntimeError(f"{op}: {name}: {reason}")
    if x.numel() and x.stride(-1) != 1:
        raise RuntimeError(f"{op}: {name} must have contiguous rows, got strides {x.stride()}")


def check_shape(op: str, name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Refuses a tensor of another shape.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    if list(x.shape) != list(shape):
        raise RuntimeError(f"{op}: {name} must have shape {list(shape)}, got {list(x.shape)}")


def rows_to_write(op: str, name: str, x: Tensor) -> Tensor:
    """[rows, width] of x itself.

    Raises:
        RuntimeError: It has no dimension, or rows that are not evenly spaced or share memory.
    """
    if not x.dim():
        raise RuntimeError(f"{op}: {name} must have at least one dimension, got a scalar")
    count, width = math.prod(x.shape[:-1]), x.shape[-1]
    try:
        rows = x.view(count, width)
    except RuntimeError:
        raise RuntimeError(
            f"{op}: {name} must have evenly spaced rows, got strides that fold into no single "
            "row stride; call .contiguous()"
        ) from None
    if count > 1 and rows.stride(0) < width:
        raise RuntimeError(
            f"{op}: {name} must not overlap itself (stride >= {width}), got stride {rows.stride(0)}"
        )
    return rows


def check_apart(op: str, x: Tensor, residual: Tensor) -> None:
    """Refuses a residual in x's memory: it is written before all of x has been read.

    Args:
        x, residual: [rows, width]; those of residual are apart in themselves.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    if not x.numel():
        return
    distance = (residual.data_ptr() - x.data_ptr()) // x.element_size()
    width, stride = x.shape[1], x.stride(0)
    if distance >= _extent(x) or -distance >= _extent(residual):
        return
    # Rows side by side in one buffer, as halves of its columns are, do not meet.
    if stride == residual.stride(0) >= 2 * width and width <= distance % stride <= stride - width:
        return
    raise RuntimeError(f"{op}: residual must not overlap x, got memory {distance} elements from it")


def _extent(rows: Tensor) -> int:
    return (rows.shape[0] - 1) * rows.stride(0) + rows.shape[1]


def width_of(op: str, x: Tensor) -> int:
    """k of x, [..., k].

    Raises:
        RuntimeError: x has no dimension.
    """
    if not x.dim():
        raise RuntimeError(f"{op}: x must be [..., k], got {list(x.shape)}")
    return x.shape[-1]


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def next_power_of_2(n: int, least: int = 1) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def precision_of(x: Tensor) -> str:
    """Of product: float32 is multiplied as float32, never as TF32."""
    if x.dtype == torch.int8:
        return "int8"
    if IS_INTERPRETED:
        return "interpreted"
    if x.dtype == torch.float8_e4m3fn:
        return "fp8"
    return "ieee" if x.dtype == torch.float32 else "tf32"


@cache
def dependent(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that begins with kernels.dependent.begin: Hopper and later GPUs
    of NVIDIA put it in place while the one before it ends. The linear layers' are none: put in
    place early, their many programs crowd on some of the multiprocessors."""
    if has_tma(device):  # of the same GPUs
        return {"IS_DEPENDENT": True, "launch_pdl": True}
    return {"IS_DEPENDENT": False}


@cache
def has_tma(device: torch.device) -> bool:
    """Whether tiles can be read by descriptors, without a thread's help: Hopper and later."""
    return (
        device.type == "cuda"
        and not IS_INTERPRETED
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def descriptor(x: Tensor, block: Sequence[int]) -> TensorDescriptor | None:
    """Of tiles of x; None where the hardware cannot read them as x lies."""
    size = x.element_size()
    if not x.numel() or x.data_ptr() % 16 or x.stride(-1) != 1:
        return None
    if any(stride * size % 16 or stride <= 0 for stride in x.stride()[:-1]):
        return None
    return TensorDescriptor.from_tensor(x, list(block))


@cache
def shared_bytes_per_program(device: torch.device) -> int:
    """Shared memory that a program may have; of the interpreter, as much as an H200's."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 64 * 1024))  # AMD's: 64 KiB


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; of the interpreter, one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
