"""Tensor cores: what a GPU has, the switches of torch, products, AMP, and a whole model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.cuda.optimize import optimize_for_tensor_cores
from llamatelemetry.cuda.scaled_matmul import scaled_matmul
from llamatelemetry.cuda.tensor_core_config import (
    DTYPES,
    TensorCoreConfig,
    capability_of,
    check_dtype,
    check_tensor_core_support,
    enable_tensor_cores,
    why_unsupported,
)
from llamatelemetry.cuda.tensor_core_figures import figures_for

__all__ = [
    "TensorCoreConfig",
    "TensorCoreMatMul",
    "check_tensor_core_support",
    "enable_amp",
    "enable_tensor_cores",
    "get_tensor_core_info",
    "matmul_tensor_core",
    "optimize_for_tensor_cores",
]


def matmul_tensor_core(
    A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> Tensor:
    """Product of two matrices by tensor cores: ``A @ B``, inputs rounded to dtype.

    Sums are in float32. Rows of A and columns of B beyond float16's 65504 are scaled by powers of
    two, and the product scaled back, so that no finite input becomes inf.

    Args:
        A: [..., M, K], any floating dtype.
        B: [..., K, N], any floating dtype; leading dims broadcast.
        out: [..., M, N], dtype of A; is written and returned.
        dtype: float16, bfloat16, or float32 for TF32 where it is allowed.

    Returns:
        [..., M, N], dtype of A.

    Raises:
        RuntimeError: naming the argument, the rule and the value.

    Example:
        >>> matmul_tensor_core(torch.full((2, 4), 60000.0), torch.full((4, 2), 2.0))
        tensor([[480000., 480000.],
                [480000., 480000.]])
    """
    _check_matmul(A, B, dtype)
    if A.dtype == B.dtype == dtype or dtype == torch.float32:
        result = (A.to(dtype) @ B.to(dtype)).to(A.dtype)
    else:
        result = scaled_matmul(A, B, dtype).to(A.dtype)
    if out is None:
        return result
    for what in ("shape", "dtype", "device"):
        want, got = getattr(result, what), getattr(out, what)
        if want != got:
            want, got = (list(w) if what == "shape" else w for w in (want, got))
            raise RuntimeError(f"matmul_tensor_core: out must have {what} {want}, got {got}")
    return out.copy_(result)


def _check_matmul(A: Tensor, B: Tensor, dtype: torch.dtype) -> None:
    op = "matmul_tensor_core"
    check_dtype(op, dtype, DTYPES)
    for name, matrix in (("A", A), ("B", B)):
        if not isinstance(matrix, Tensor):
            raise RuntimeError(f"{op}: {name} must be a tensor, got {type(matrix).__name__}")
        if not matrix.dtype.is_floating_point:
            raise RuntimeError(f"{op}: {name} must be floating point, got {matrix.dtype}")
        if matrix.ndim < 2:
            raise RuntimeError(
                f"{op}: {name} must have at least two dimensions, got {list(matrix.shape)}"
            )
    if A.shape[-1] != B.shape[-2]:
        raise RuntimeError(
            f"{op}: B must have {A.shape[-1]} rows, as A has columns, got {list(B.shape)}"
        )


class TensorCoreMatMul(nn.Module):
    """matmul_tensor_core as a module.

    Args:
        dtype: what the inputs are rounded to.

    Example:
        >>> TensorCoreMatMul()(torch.ones(2, 3), torch.ones(3, 1))
        tensor([[3.],
                [3.]])
    """

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        check_dtype("TensorCoreMatMul", dtype, DTYPES)
        super().__init__()
        self.dtype = dtype

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        """``A @ B``; see matmul_tensor_core."""
        return matmul_tensor_core(A, B, dtype=self.dtype)


def enable_amp(
    dtype: torch.dtype = torch.float16, cache_enabled: bool = True
) -> tuple[torch.amp.GradScaler, torch.amp.autocast]:
    """A gradient scaler and an autocast context for mixed-precision training.

    Without CUDA both are the CPU's: the scaler is disabled, and autocast uses bfloat16 in the
    place of float16, whose gradients would underflow without a scaler.

    Args:
        dtype: what autocast computes in: float16, which needs and gets an enabled scaler, or
            bfloat16.
        cache_enabled: whether autocast keeps the cast weights for the length of a ``with``.

    Returns:
        The scaler, and the context, which may be entered again in every step of a loop.

    Raises:
        RuntimeError: for a dtype that autocast does not compute in.

    Example:
        >>> layer = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> scaler, autocast = enable_amp()
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     with autocast:
        ...         loss = layer(torch.ones(8, 4)).square().mean()
        ...     scaler.scale(loss).backward()
        ...     scaler.step(optimizer)
        ...     scaler.update()
    """
    check_dtype("enable_amp", dtype, (torch.float16, torch.bfloat16))
    if torch.cuda.is_available():
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        return scaler, torch.amp.autocast("cuda", dtype=dtype, cache_enabled=cache_enabled)
    warnings.warn(
        "enable_amp: there is no CUDA device, so autocast is the CPU's, in bfloat16, and the "
        "scaler is disabled",
        stacklevel=1,
    )
    autocast = torch.amp.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache_enabled)
    return torch.amp.GradScaler("cpu", enabled=False), autocast


def get_tensor_core_info(device: int = 0) -> dict[str, Any]:
    """What is known of a GPU's tensor cores.

    Args:
        device: index of the CUDA device.

    Returns:
        device: its name, or "cpu". compute_capability: "7.5", or None. supported: bool.
        architecture: NVIDIA's name, or None. fp16_tflops, int8_tops: peak rates by the data
        sheet, dense; 0.0 where there are no tensor cores. estimated_speedup: fp16_tflops over the
        card's float32 rate; 1.0 where there are none. card, source: whose figures they are and
        where they are printed. reason: only where unsupported or without figures, why.

    Example:
        >>> get_tensor_core_info()["reason"]  # on a machine without a GPU
        'there is no CUDA device, so there are no tensor cores to use'
    """
    capability = capability_of(device)
    name = "cpu" if capability is None else torch.cuda.get_device_name(device)
    info: dict[str, Any] = {
        "device": name,
        "compute_capability": None if capability is None else "{}.{}".format(*capability),
        "supported": capability is not None and capability >= (7, 0),
        "architecture": None,
        "fp16_tflops": 0.0,
        "int8_tops": 0.0,
        "estimated_speedup": 1.0,
    }
    if capability is None or not info["supported"]:
        return info | {"reason": why_unsupported(device)}
    figures = figures_for(name, capability)
    if figures is None:
        return info | {"reason": f"no figures are known for {name}"}
    return info | {
        "architecture": figures.architecture,
        "fp16_tflops": figures.fp16_tflops,
        "int8_tops": figures.int8_tops,
        "estimated_speedup": round(figures.fp16_tflops / figures.fp32_tflops, 1),
        "card": figures.card,
        "source": figures.source,
    }
