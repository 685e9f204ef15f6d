"""Norms and gated activations as custom ops; semantics are those of ``llamatelemetry.ops``."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.triton_ops.kernels.activation import gated_kernel
from llamatelemetry.triton_ops.kernels.norm import layer_norm_kernel, rms_norm_kernel
from llamatelemetry.triton_ops.launch import (
    check,
    check_apart,
    check_shape,
    dependent,
    next_power_of_2,
    on_device,
    rows_to_write,
)

_LANES = 512  # elements of a row for each 32 threads
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def _rows(x: Tensor) -> Tensor:
    """[rows, width], without a copy where rows are evenly spaced."""
    return x.reshape(-1, x.shape[-1])


def _launch(width: int) -> dict[str, int]:
    block = next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // _LANES, 1), 16)}


@torch.library.custom_op("llamatelemetry_triton::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """``llamatelemetry.ops.rms_norm`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    check("rms_norm", "x", x)
    check("rms_norm", "weight", weight, like=x)
    check_shape("rms_norm", "weight", weight, x.shape[-1:])
    out, rows = torch.empty(x.shape, dtype=x.dtype, device=x.device), _rows(x)
    _run_rms_norm(rows, None, weight, _rows(out), eps, weight_offset)
    return out


def _run_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    weight_offset: float,
) -> None:
    if x.numel() == 0:
        return
    with on_device(x):
        rms_norm_kernel[(x.shape[0],)](
            *(x, residual, weight, out, x.stride(0)),
            *(0 if residual is None else residual.stride(0), out.stride(0)),
            *(x.shape[1], eps, weight_offset),
            HAS_OFFSET=weight_offset != 0.0,
            **_launch(x.shape[1]),
            **dependent(x.device),
        )


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "llamatelemetry_triton::fused_add_rms_norm_", mutates_args=("x", "residual")
)
def fused_add_rms_norm_(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> None:
    """``llamatelemetry.ops.fused_add_rms_norm_`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "fused_add_rms_norm_"
    check(op, "x", x)
    check(op, "residual", residual, like=x)
    check(op, "weight", weight, like=x)
    check_shape(op, "residual", residual, x.shape)
    check_shape(op, "weight", weight, x.shape[-1:])
    rows, sums = rows_to_write(op, "x", x), rows_to_write(op, "residual", residual)
    check_apart(op, rows, sums)
    _run_rms_norm(rows, sums, weight, rows, eps, weight_offset)


@fused_add_rms_norm_.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> None:
    return None


@torch.library.custom_op("llamatelemetry_triton::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float = 0.0
) -> Tensor:
    """``llamatelemetry.ops.layer_norm`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    check("layer_norm", "x", x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check("layer_norm", name, vector, like=x)
            check_shape("layer_norm", name, vector, x.shape[-1:])
    out, rows = torch.empty(x.shape, dtype=x.dtype, device=x.device), _rows(x)
    if x.numel():
        with on_device(x):
            layer_norm_kernel[(rows.shape[0],)](
                *(rows, weight, bias, out, rows.stride(0), rows.shape[1], eps, weight_offset),
                **_launch(rows.shape[1]),
            )
    return out


@layer_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float = 0.0
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("llamatelemetry_triton::gated", mutates_args=())
def gated(x: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of [..., 2 * size], as ``llamatelemetry.ops.silu_and_mul``.

    Args:
        activation: "silu", "gelu" or "gelu_tanh".

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    check("gated", "x", x)
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"gated: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if x.shape[-1] % 2:
        raise RuntimeError(f"gated: x must have an even number of columns, got {x.shape[-1]}")
    size, rows = x.shape[-1] // 2, _rows(x)
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if out.numel():
        with on_device(x):
            block = next_power_of_2(min(size, 1024))
            grid = (rows.shape[0], -(-size // block))
            gated_kernel[grid](rows, out, rows.stride(0), size, activation, block)
    return out


@gated.register_fake
def _(x: Tensor, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
