"""Triton kernels by name, and three of them as functions and as custom ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llamatelemetry.cuda.triton_configs import KernelConfig
from llamatelemetry.cuda.triton_registry import (
    TRITON_AVAILABLE,
    TritonKernel,
    get_kernel,
    launch_options,
    launchable,
    list_kernels,
    register_kernel,
)

__all__ = [
    "TRITON_AVAILABLE",
    "KernelConfig",
    "TritonKernel",
    "get_kernel",
    "list_kernels",
    "register_kernel",
    "triton_add",
    "triton_layernorm",
    "triton_softmax",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = (*_FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def triton_add(x: Tensor, y: Tensor) -> Tensor:
    """Sum: ``x + y``.

    Where a gradient is needed, or Triton cannot run on the tensors' device, it is torch's own sum.

    Args:
        x: any shape and strides; float16, bfloat16, float32, float64 or integer.
        y: likewise; broadcast against x, and promoted with it, as torch does.

    Returns:
        The sum, contiguous.

    Raises:
        RuntimeError: naming the argument, the rule and the value.

    Example:
        >>> triton_add(torch.ones(2, 1), torch.ones(3)).shape
        torch.Size([2, 3])
    """
    _check("triton_add", "x", x, _NUMBERS)
    _check("triton_add", "y", y, _NUMBERS, like=x)
    if _needs_grad(x, y):
        return x + y
    return torch.ops.llamatelemetry_triton.add(x, y)


def triton_layernorm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer norm: ``(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`` over the last dim.

    Where a gradient is needed, or Triton cannot run on the tensors' device, it is torch's own.

    Args:
        x: [..., width], any strides; float16, bfloat16, float32 or float64.
        weight: [width], any floating dtype; ones if None.
        bias: [width], any floating dtype; zeros if None.
        eps: added to the variance.

    Returns:
        Shape and dtype of x, contiguous; statistics in float32, rounded once.

    Raises:
        RuntimeError: naming the argument, the rule and the value.

    Source:
        Ba, Kiros & Hinton 2016, arXiv:1607.06450

    Example:
        >>> triton_layernorm(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.0000,  1.0000]])
    """
    _check("triton_layernorm", "x", x, _FLOATS)
    if x.ndim == 0:
        raise RuntimeError("triton_layernorm: x must have at least one dimension, got a scalar")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _check("triton_layernorm", name, vector, _FLOATS, like=x)
            if vector.shape != x.shape[-1:]:
                raise RuntimeError(
                    f"triton_layernorm: {name} must have the shape [width] = "
                    f"{list(x.shape[-1:])}, got {list(vector.shape)}"
                )
    if _needs_grad(x, weight, bias):
        return _torch_layernorm(x, weight, bias, eps)
    return torch.ops.llamatelemetry_triton.layernorm(x, weight, bias, eps)


def triton_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Softmax: ``exp(x - max(x)) / sum(exp(x - max(x)))`` over one dimension.

    Where a gradient is needed, or Triton cannot run on the tensor's device, it is torch's own.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        dim: the dimension that is summed over; may be negative.

    Returns:
        Shape and dtype of x, contiguous; a row with a NaN, an inf or only -inf is all NaN, as in
        torch, and changes no other.

    Raises:
        RuntimeError: naming the argument, the rule and the value.
        IndexError: x has no such dimension.

    Example:
        >>> triton_softmax(torch.zeros(2, 4), dim=0)[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    _check("triton_softmax", "x", x, _FLOATS)
    if not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise IndexError(f"triton_softmax: dim must be a dimension of x, {x.ndim}-d, got {dim}")
    if _needs_grad(x):
        return torch.softmax(x, dim)
    return torch.ops.llamatelemetry_triton.softmax(x, dim % max(x.ndim, 1))


@torch.library.custom_op("llamatelemetry_triton::add", mutates_args=())
def _add(x: Tensor, y: Tensor) -> Tensor:
    kernel = launchable("add", x)
    if kernel is None:
        return torch.add(x, y).contiguous()
    dtype = torch.result_type(x, y)
    x, y = (t.to(dtype).contiguous() for t in torch.broadcast_tensors(x, y))
    out = torch.empty_like(x)
    kernel.launch(x, y, out, x.numel(), **launch_options(kernel, x, None))
    return out


@torch.library.custom_op("llamatelemetry_triton::layernorm", mutates_args=())
def _layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    kernel = launchable("layernorm", x)
    if kernel is None:
        return _torch_layernorm(x, weight, bias, eps).contiguous()
    x = x.contiguous()
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    out, width = torch.empty_like(x), x.shape[-1]
    if x.numel():
        options = launch_options(kernel, x, width)
        grid = (x.numel() // width,)
        kernel.launch(x, weight, bias, out, width, eps, grid=grid, **options)
    return out


@torch.library.custom_op("llamatelemetry_triton::softmax", mutates_args=())
def _softmax(x: Tensor, dim: int) -> Tensor:
    kernel = launchable("softmax", x)
    if kernel is None:
        return torch.softmax(x, dim).contiguous()
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        size = x.shape[dim] if x.ndim else 1
        inner = math.prod(x.shape[dim + 1 :])
        options = launch_options(kernel, x, size)
        kernel.launch(x, out, size, inner, grid=(x.numel() // size,), **options)
    return out


@_add.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return x.new_empty(shape, dtype=torch.result_type(x, y))


@_layernorm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_softmax.register_fake
def _(x: Tensor, dim: int) -> Tensor:
    return x.new_empty(x.shape)


def _torch_layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Weights of another dtype than x's are multiplied in float32, as in the kernel."""
    vectors = [v for v in (weight, bias) if v is not None]
    if all(v.dtype == x.dtype for v in vectors):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if v is None else v.to(wide) for v in (weight, bias))
    out = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    return out.to(x.dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check(
    op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], like: Tensor | None = None
) -> None:
    if not isinstance(tensor, Tensor):
        raise RuntimeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype)[6:] for dtype in dtypes)
        raise RuntimeError(f"{op}: {name} must be one of {names}, got {str(tensor.dtype)[6:]}")
    if like is not None and tensor.device != like.device:
        raise RuntimeError(
            f"{op}: {name} must be on the device of x, {like.device}, got {tensor.device}"
        )
