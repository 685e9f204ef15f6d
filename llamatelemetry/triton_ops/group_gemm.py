"""Linear layers over packed codes of 4 and 8 bits as a custom op: GPTQ's and AWQ's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llamatelemetry.ops.formats import TILE_ROWS
from llamatelemetry.triton_ops import gemm
from llamatelemetry.triton_ops.kernels.group_gemm import (
    arrange_kernel,
    expand_kernel,
    group_linear_kernel,
)
from llamatelemetry.triton_ops.launch import (
    IS_INTERPRETED,
    check,
    check_shape,
    dependent,
    next_power_of_2,
    num_multiprocessors,
    on_device,
    precision_of,
    width_of,
)
from llamatelemetry.triton_ops.norm import ACTIVATIONS
from llamatelemetry.triton_ops.tuning import linear_config

# Name of a format -> bits of a code, and what is taken from one where no zero points are given.
FORMATS = {"U4": (4, 0), "S4": (4, 8), "S8": (8, 0)}
MOST_ROWS = 64  # of more, the weights are expanded once and multiplied as dense ones


@dataclass(frozen=True)
class GroupConfig:
    """How group_linear_kernel is launched; block_w: words of 32 bits, splits: parts of k."""

    block_n: int = 64
    block_w: int = 16
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


def group_config(n: int, num_words: int, multiprocessors: int) -> GroupConfig:
    """A launch for weight rows of so many words: enough programs to ask all memory at once."""
    config = GroupConfig()
    splits, programs = 1, -(-n // config.block_n)
    while programs * splits * 2 <= 8 * multiprocessors and num_words // (splits * 2) >= 128:
        splits *= 2
    return GroupConfig(splits=splits)


@torch.library.custom_op("llamatelemetry_triton::group_linear", mutates_args=())
def group_linear(
    x: Tensor,
    weight: Tensor,
    format: str,
    n: int,
    scales: Tensor,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``x[..., perm] @ (scale * (code - zero)).T + bias``; or of a gated layer
    ``act(gate) * up`` of its two halves.

    Args:
        x: [..., k], float32, float16 or bfloat16; k a multiple of 32.
        weight: [ceil(n / 16), 16 * row_bytes] uint8, from ops.repack.
        format: "U4", "S4" or "S8".
        n: Rows of weight; of a gated layer gates first, then as many more.
        scales: [ceil(n / 16), groups, 16] float32; groups divide k, by 32 columns or more each.
        zeros: As scales, uint8; given for "U4", and for it alone.
        perm: [k] int32, the order of columns in which weight was packed, every column once.
        bias: [n], dtype and device of x.
        activation: None; or "silu", "gelu" or "gelu_tanh": the layer is gated.

    Returns:
        [..., n], or of a gated layer [..., n / 2], in x's dtype. Up to 64 rows of x are multiplied
        by codes, whose scales follow in float32 sums, where groups are a multiple of 128 columns in
        4 bits and of 64 in 8; else, and of more rows, weights are rounded to x's dtype first.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    _check(x, weight, format, n, scales, zeros, perm, bias, activation)
    rows = x.reshape(-1, x.shape[-1])
    size = n // (1 if activation is None else 2)
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    with on_device(x):
        if len(rows) <= MOST_ROWS:
            words = x.shape[-1] * FORMATS[format][0] // 32
            few = group_config(n, words, num_multiprocessors(x.device))
            run(rows, weight, format, n, scales, zeros, perm, bias, activation, out, few)
        else:
            dense = _expanded(rows, weight, format, n, scales, zeros, perm)
            many = linear_config(
                *(len(rows), size, x.shape[-1], activation is not None, x.dtype, x.device)
            )
            gemm.run(rows, dense, bias, activation, out, many)
    return out


@group_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    format: str,
    n: int,
    scales: Tensor,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n // (1 if activation is None else 2)))


def _check(
    x: Tensor,
    weight: Tensor,
    format: str,
    n: int,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    op = "group_linear"
    k = width_of(op, x)
    check(op, "x", x)
    if format not in FORMATS:
        raise RuntimeError(f"{op}: format must be one of {sorted(FORMATS)}, got {format!r}")
    if k % 32 or n < 1:
        raise RuntimeError(f"{op}: k must be a multiple of 32 and n positive, got {k} and {n}")
    tiles = -(-n // TILE_ROWS)
    check_shape(op, "weight", weight, (tiles, TILE_ROWS * k * FORMATS[format][0] // 8))
    if scales.dim() != 3 or not 1 <= scales.shape[1] <= k // 32 or k % (32 * scales.shape[1]):
        raise RuntimeError(
            f"{op}: scales must be [{tiles}, groups, {TILE_ROWS}] with groups of {k} columns in "
            f"multiples of 32, got {list(scales.shape)}"
        )
    check_shape(op, "scales", scales, (tiles, scales.shape[1], TILE_ROWS))
    if (zeros is None) != (format != "U4"):
        wanted = "given" if format == "U4" else "None"
        raise RuntimeError(
            f"{op}: zeros must be {wanted} for {format}, got "
            f"{'None' if zeros is None else 'a tensor'}"
        )
    of_dtype = [("weight", weight, torch.uint8), ("scales", scales, torch.float32)]
    if zeros is not None:
        check_shape(op, "zeros", zeros, scales.shape)
        of_dtype.append(("zeros", zeros, torch.uint8))
    if perm is not None:
        check_shape(op, "perm", perm, (k,))
        of_dtype.append(("perm", perm, torch.int32))
    for name, tensor, dtype in of_dtype:
        if tensor.dtype != dtype or tensor.device != x.device or not tensor.is_contiguous():
            raise RuntimeError(
                f"{op}: {name} must be contiguous, {dtype} and on {x.device} as x, got "
                f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            )
    if bias is not None:
        check(op, "bias", bias, like=x)
        check_shape(op, "bias", bias, (n,))
    if activation is not None and activation not in ACTIVATIONS:
        raise RuntimeError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation is not None and n % 2:
        raise RuntimeError(f"{op}: n must be even of a gated layer, got {n}")


def run(
    x: Tensor,
    weight: Tensor,
    format: str,
    n: int,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor,
    config: GroupConfig,
) -> None:
    """Launches group_linear of up to 64 rows with a config, on the current device.

    Args:
        x: [m, k].
        out: written.
    """
    (m, k), (bits, zero) = x.shape, FORMATS[format]
    splits, target = config.splits, out
    is_part = splits > 1 or activation is not None
    if is_part:
        target = torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    group, num_words = k // scales.shape[1], k * bits // 32
    arranged = torch.empty((32 // bits, m, num_words), dtype=x.dtype, device=x.device)
    block = next_power_of_2(min(num_words, 2**20 if IS_INTERPRETED else 512), 16)
    arrange_kernel[(m, -(-num_words // block), 32 // bits)](
        *(x, perm, arranged, m, num_words, x.stride(0)),
        BITS=bits,
        BLOCK=block,
        num_warps=4,
        **dependent(x.device),
    )
    group_linear_kernel[(-(-n // config.block_n), splits)](
        *(arranged, weight.view(torch.int32), scales, zeros, bias, target),
        *(m, n, len(weight) * TILE_ROWS, k, group),
        BITS=bits,
        ZERO=zero,
        IS_PART=is_part,
        IN_ONE_GROUP=group % (config.block_w * 32 // bits) == 0,
        SPLITS=splits,
        BLOCK_M=next_power_of_2(m, 16),
        BLOCK_N=config.block_n,
        BLOCK_W=config.block_w,
        PRECISION=precision_of(x),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if is_part:
        gemm.combine(target, bias, activation, out)


def _expanded(
    x: Tensor,
    weight: Tensor,
    format: str,
    n: int,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
) -> Tensor:
    """The weights [n, k] in x's dtype, their columns in the order of x."""
    k, (bits, zero) = x.shape[1], FORMATS[format]
    out = torch.empty((n, k), dtype=x.dtype, device=x.device)
    block_n, block_k = (256, 512) if IS_INTERPRETED else (16, 128)
    expand_kernel[(-(-n // block_n), -(-k // block_k))](
        *(weight.view(torch.int32), scales, zeros, perm, out, n, k, k // scales.shape[1]),
        BITS=bits,
        ZERO=zero,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return out
