"""Linear layers of fp8 e4m3 on both sides as a custom op."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.triton_ops import gemm
from llamatelemetry.triton_ops.launch import FLOATS, check_shape, on_device, why_not_on, width_of
from llamatelemetry.triton_ops.tuning import linear_config


@torch.library.custom_op("llamatelemetry_triton::scaled_linear", mutates_args=())
def scaled_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """``llamatelemetry.ops.scaled_linear`` of e4m3 in Triton.

    Args:
        x: [..., k] float8_e4m3fn, k a multiple of 16, from 16 on.
        x_scales: float32, one for each row of x, contiguous.
        weight: [n, k], dtype and device of x.
        weight_scales: float32, one for each row of weight, contiguous.
        dtype: Of the result: float32, float16 or bfloat16.
        bias: [n], of dtype.

    Returns:
        [..., n] in dtype; sums are float32, but Hopper's tensor cores keep some 14 bits within a
        tile of k. Scales and bias follow in float32, and one rounding.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    _check(x, x_scales, weight, weight_scales, dtype, bias)
    (n, k), rows = weight.shape, x.reshape(-1, x.shape[-1])
    out = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    if out.numel():
        config = linear_config(len(rows), n, k, False, x.dtype, x.device)
        with on_device(x):
            gemm.run(rows, weight, bias, None, out, config, (x_scales, weight_scales))
    return out


@scaled_linear.register_fake
def _(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _check(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
) -> None:
    op = "scaled_linear"
    if (reason := why_not_on(x.device)) is not None:
        raise RuntimeError(f"{op}: x: {reason}")
    if (
        x.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) < (8, 9)
    ):
        raise RuntimeError(f"{op}: e4m3 needs compute capability 8.9, got an older GPU")
    if dtype not in FLOATS:
        raise RuntimeError(f"{op}: dtype must be float32, float16 or bfloat16, got {dtype}")
    k = width_of(op, x)
    if k % 16 or not k:
        raise RuntimeError(f"{op}: k must be a multiple of 16, from 16 on, got {k}")
    if not weight.dim():
        raise RuntimeError(f"{op}: weight must be [n, {k}], got {list(weight.shape)}")
    check_shape(op, "weight", weight, (weight.shape[0], k))
    n, m = weight.shape[0], x.numel() // max(k, 1)
    wanted = [
        ("x", x, torch.float8_e4m3fn, None),
        ("weight", weight, torch.float8_e4m3fn, None),
        ("x_scales", x_scales, torch.float32, m),
        ("weight_scales", weight_scales, torch.float32, n),
    ]
    if bias is not None:
        check_shape(op, "bias", bias, (n,))
        wanted.append(("bias", bias, dtype, n))
    for name, tensor, kind, count in wanted:
        if tensor.dtype != kind or tensor.device != x.device:
            raise RuntimeError(
                f"{op}: {name} must be {kind} on {x.device} as x, got {tensor.dtype} on "
                f"{tensor.device}"
            )
        if count is not None and (tensor.numel() != count or not tensor.is_contiguous()):
            raise RuntimeError(
                f"{op}: {name} must be {count} contiguous values, got {list(tensor.shape)} with "
                f"strides {tensor.stride()}"
            )
        if count is None and tensor.numel() and tensor.stride(-1) != 1:
            raise RuntimeError(
                f"{op}: {name} must have contiguous rows, got strides {tensor.stride()}"
            )
