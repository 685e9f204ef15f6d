"""scaled_linear of int8 and e4m3 against torch's dense linear and its products of bytes, and rows
quantised where they are made: SmolLM2-135M's shapes and a larger one on the CPU, where dense is
float32, and Llama-3-8B's on a GPU, where it is bfloat16.

Rows named e4m3 are of W8A8Linear: our product at one and 64 rows, torch's own at 2048 on Hopper.
Those in blocks are of our product alone.

The limit of products is torch's product of squares in that dtype; of rows a read and a write.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor
from torch.nn.functional import linear, pad

from llamatelemetry.ops import (
    fused_add_rms_norm_quantize_,
    quantize_rows,
    rms_norm,
    rms_norm_quantize,
    scaled_linear,
    silu_and_mul,
    silu_and_mul_quantize,
)
from llamatelemetry.quantization.w8a8 import W8A8Linear

SHAPES = {  # name: n, k
    "cpu": {"up": (1536, 576), "down": (576, 1536), "large": (4096, 4096)},
    "cuda": {
        "QKV": (6144, 4096),
        "O": (4096, 4096),
        "gate+up": (28672, 4096),
        "down": (4096, 14336),
    },
}
ROWS = {"cpu": (1, 16, 128), "cuda": (1, 64, 2048)}
MADE_ROWS = {"cpu": 128, "cuda": 2048}
DENSE = {"cpu": torch.float32, "cuda": torch.bfloat16}
KINDS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
BLOCK = 128


def near(ours: Tensor, theirs: Tensor) -> None:
    """Both matrices are rounded to a byte a value."""
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error < 0.06, f"results differ by {error:.3g} of their norm"


def torch_bytes(q: Tensor, scales: Tensor, w: Tensor, w_scales: Tensor) -> Tensor:
    """torch's product of bytes, scaled to the dtype of dense weights."""
    dtype = DENSE[q.device.type]
    if q.dtype == torch.int8:
        if len(q) <= 16:  # torch asks for 17 rows
            q = torch.cat([q, q.new_zeros(17 - len(q), q.shape[1])])
            return (torch._int_mm(q, w.T)[: len(scales)] * (scales * w_scales.T)).to(dtype)
        return (torch._int_mm(q, w.T) * (scales * w_scales.T)).to(dtype)
    return torch._scaled_mm(q, w.T, scales, w_scales.T, out_dtype=torch.bfloat16)


def multiply(q: Tensor, scales: Tensor, w: Tensor, w_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As a model multiplies: many rows of e4m3 are torch's product on Hopper."""
    if q.is_cuda:  # replayed from a graph, so that making the module is not timed
        return W8A8Linear(w, w_scales).multiply(q, scales, dtype)
    return scaled_linear(q, scales, w, w_scales, dtype)


def torchs(device: torch.device) -> str:
    """The name of torch's dense linear."""
    return f"torch {DENSE[device.type]}".replace("torch.", "")


def products(device: torch.device, quick: bool) -> Iterator[Case]:
    dtype_of_dense = DENSE[device.type]
    for name, (n, k) in list(SHAPES[device.type].items())[: 1 if quick else None]:
        weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype_of_dense)
        for m in ROWS[device.type][: 1 if quick else None]:
            x = torch.randn(m, k, device=device).to(dtype_of_dense)
            for kind, dtype in KINDS.items():
                inputs = (*quantize_rows(x, dtype), *quantize_rows(weight, dtype), x, weight)
                baselines = {torchs(device): lambda q, s, w, ws, x, dense: linear(x, dense)}
                if device.type == "cuda" or kind == "int8":
                    baselines["torch bytes"] = lambda q, s, w, ws, x, dense: torch_bytes(
                        q, s, w, ws
                    )
                yield Case(
                    f"{name} {k}->{n} m={m} {kind}",
                    inputs=inputs,
                    ours=lambda q, s, w, ws, x, dense: multiply(q, s, w, ws, dtype_of_dense),
                    baselines=baselines,
                    flops=2 * m * n * k,
                    flops_dtype=dtype_of_dense,
                    check=near,
                )


def blocks(device: torch.device, quick: bool) -> Iterator[Case]:
    """e4m3 with a scale for 1 x 128 values of x and 128 x 128 of the weight."""
    dtype = DENSE[device.type]
    for name, (n, k) in list(SHAPES[device.type].items())[: 1 if quick else None]:
        weight = torch.randn(n, k, device=device) / k**0.5
        wide = pad(weight, (0, -k % BLOCK, 0, -n % BLOCK))
        tiles = wide.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)
        w_scales = tiles.abs().amax((2, 3)) / 448
        each = w_scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:n, :k]
        w, dense = (weight / each).to(torch.float8_e4m3fn), weight.to(dtype)
        for m in ROWS[device.type][: 1 if quick else None]:
            x = torch.randn(m, k, device=device).to(dtype)
            inputs = (*quantize_rows(x, torch.float8_e4m3fn, BLOCK), w, w_scales, x, dense)
            yield Case(
                f"{name} {k}->{n} m={m} e4m3 in blocks",
                inputs=inputs,
                ours=lambda q, s, w, ws, x, dense: scaled_linear(q, s, w, ws, dtype, None, BLOCK),
                baselines={torchs(device): lambda q, s, w, ws, x, dense: linear(x, dense)},
                flops=2 * m * n * k,
                flops_dtype=dtype,
                check=near,
            )


def close_rows(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Bytes times scales."""
    near(ours[0].float() * ours[1], theirs[0].float() * theirs[1])


def rows(device: torch.device, quick: bool) -> Iterator[Case]:
    size = 4096 if device.type == "cuda" else 576
    weight = torch.randn(size, device=device).bfloat16()
    for m in (1, MADE_ROWS[device.type]):
        x, two = (torch.randn(m, c * size, device=device).bfloat16() for c in (1, 2))
        yield Case(
            f"fused_add_rms_norm_quantize_ {m}x{size}",
            inputs=(torch.zeros_like(x), x.clone(), weight),
            ours=lambda x, y, w: fused_add_rms_norm_quantize_(x, y, w, torch.int8),
            baselines={"apart": lambda x, y, w: rms_norm_quantize(y.add_(x), w, torch.int8)},
            bytes_moved=m * size * 7,
            check=close_rows,
        )
        yield Case(
            f"rms_norm_quantize {m}x{size}",
            inputs=(x, weight),
            ours=lambda x, w: rms_norm_quantize(x, w, torch.int8),
            baselines={"apart": lambda x, w: quantize_rows(rms_norm(x, w), torch.int8)},
            bytes_moved=m * size * 3,
            check=close_rows,
        )
        yield Case(
            f"silu_and_mul_quantize {m}x{size}",
            inputs=(two,),
            ours=lambda x: silu_and_mul_quantize(x, torch.int8),
            baselines={"apart": lambda x: quantize_rows(silu_and_mul(x), torch.int8)},
            bytes_moved=m * size * 5,
            check=close_rows,
        )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    yield from products(device, quick)
    yield from blocks(device, quick)
    yield from rows(device, quick)


if __name__ == "__main__":
    main("w8a8", cases)
