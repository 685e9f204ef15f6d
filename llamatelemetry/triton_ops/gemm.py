"""Linear layers as a custom op, the gate of an MLP in the epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.triton_ops.kernels.gemm import combine_kernel, linear_kernel
from llamatelemetry.triton_ops.kernels.persistent_gemm import persistent_linear_kernel
from llamatelemetry.triton_ops.kernels.stream_gemm import stream_linear_kernel
from llamatelemetry.triton_ops.launch import (
    IS_INTERPRETED,
    check,
    check_shape,
    descriptor,
    next_power_of_2,
    num_multiprocessors,
    on_device,
    precision_of,
)
from llamatelemetry.triton_ops.norm import ACTIVATIONS
from llamatelemetry.triton_ops.tuning import LinearConfig, linear_config


@torch.library.custom_op("llamatelemetry_triton::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``x @ weight.T + bias``; or of a gated layer ``act(gate) * up`` of its two halves.

    Args:
        x: [..., k], float32, float16 or bfloat16.
        weight: [n, k], dtype and device of x; of a gated layer [2 * n, k], gates first.
        bias: As many as weight has rows, dtype and device of x.
        activation: None; or "silu", "gelu" or "gelu_tanh": the layer is gated.

    Returns:
        [..., n]; products are summed in float32, each part of a gated layer is rounded first.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    check("linear", "x", x)
    check("linear", "weight", weight, like=x)
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))
    if bias is not None:
        check("linear", "bias", bias, like=x)
        check_shape("linear", "bias", bias, weight.shape[:1])
    if activation is not None and activation not in ACTIVATIONS:
        raise RuntimeError(f"linear: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation is not None and weight.shape[0] % 2:
        raise RuntimeError(f"linear: weight must have an even row count, got {weight.shape[0]}")
    n = weight.shape[0] // (1 if activation is None else 2)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if out.numel():
        config = linear_config(
            rows.shape[0], n, rows.shape[1], activation is not None, x.dtype, x.device
        )
        with on_device(x):
            run(rows, weight, bias, activation, out, config)
    return out


@linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (1 if activation is None else 2)))


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor,
    config: LinearConfig,
    scales: tuple[Tensor, Tensor] | None = None,
    scale_block: int = 0,
) -> None:
    """Launches linear with a config, on the current device.

    Args:
        x: [m, k].
        out: [..., n], written.
        scales: of quantised rows of x and of weight, float32; not of a gated layer.
        scale_block: columns that share a scale, a multiple of config's block_k; 0: a row's do.
    """
    (m, k), n = x.shape, out.shape[-1]
    more = (scales or (None, None), scale_block)
    if config.tma and _run_by_descriptors(x, weight, bias, activation, out, config, *more):
        return
    splits, target = config.splits, out
    if splits > 1:
        target = torch.empty((splits, m, weight.shape[0]), dtype=torch.float32, device=x.device)
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    linear_kernel[(tiles, splits)](
        *(x, weight, bias, *more[0], target, m, n, k, x.stride(0), weight.stride(0)),
        ACTIVATION=activation,
        SPLITS=splits,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        EVEN_M=m % config.block_m == 0,
        EVEN_N=n % config.block_n == 0,
        EVEN_K=k % (config.block_k * splits) == 0,
        PRECISION=precision_of(x),
        SCALE_BLOCK=scale_block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        combine(target, bias, activation, out)


def _run_by_descriptors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    out: Tensor,
    config: LinearConfig,
    scales: tuple[Tensor | None, Tensor | None],
    scale_block: int,
) -> bool:
    """run, where x and weight lie so that descriptors can read them; whether they do."""
    (m, k), n = x.shape, out.shape[-1]
    x_tiles = descriptor(x, (config.block_m, config.block_k))
    weight_tiles = descriptor(weight, (config.block_n, config.block_k))
    if x_tiles is None or weight_tiles is None:
        return False
    programs = -(-m // config.block_m) * -(-n // config.block_n)
    kernel, parts = persistent_linear_kernel, list[Tensor]()
    if config.stream:
        steps = programs * -(-k // config.block_k)
        programs = min(config.stream * num_multiprocessors(x.device), steps)
        kernel, parts = stream_linear_kernel, _parts(x, programs, activation, config)
    elif activation is None:  # of gated layers a program a tile was faster
        programs = min(programs, num_multiprocessors(x.device))
    kernel[(programs,)](
        *(x_tiles, weight_tiles, bias, *scales, out, *parts, m, n, k),
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        PRECISION=precision_of(x),
        SCALE_BLOCK=scale_block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return True


def _parts(x: Tensor, programs: int, activation: str | None, config: LinearConfig) -> list[Tensor]:
    """What programs of stream-K leave each other: a tile of sums each, and whether it is there."""
    shape = (programs, 1 if activation is None else 2, config.block_m, config.block_n)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    return [sums, torch.zeros(programs, dtype=torch.int32, device=x.device)]


def combine(sums: Tensor, bias: Tensor | None, activation: str | None, out: Tensor) -> None:
    """Adds up parts of k, and the bias and gate.

    Args:
        sums: [splits, m, weight's rows] float32.
        out: [..., n], written.
    """
    splits, m, _ = sums.shape
    n = out.shape[-1]
    block = next_power_of_2(min(n, 2**20 if IS_INTERPRETED else 256))
    combine_kernel[(m, -(-n // block))](
        *(sums, bias, out, m, n), ACTIVATION=activation, SPLITS=splits, BLOCK=block
    )
