"""The kernels of a Llama-3-8B forward in Triton; ours in CUDA, the vendor's, FlexAttention beside.

The five of a decode step of two sequences, the linear layers at 16, 512 and 2048 rows in bfloat16,
of 512 without in 4 bits and in e4m3, attention over prompts of 512 to 16384 tokens and one query
over a cache. vendor is cuBLAS, and of attention scaled_dot_product_attention over contiguous keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import harness
import torch
from bench_prefill import run_on_gpu
from harness import Case
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llamatelemetry import ops
from llamatelemetry.models.opset import NATIVE, opset_of
from llamatelemetry.triton_ops.group_gemm import group_linear
from llamatelemetry.triton_ops.scaled_gemm import scaled_linear

HEADS, HEADS_KV, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
SHAPES = {  # outputs, inputs, gated
    "QKV": (6144, 4096, False),
    "output": (4096, 4096, False),
    "gate+up": (14336, 4096, True),
    "down": (4096, 14336, False),
}
ROWS = (2, 16, 512, 2048)
PROMPTS = (512, 1024, 2048, 4096, 8192, 16384)
DECODES = ((2, 640), (32, 4096))  # sequences, keys of each
SCORES = (HEAD_DIM**-0.5, True, -1, -1, 0.0)
_flex = torch.compile(flex_attention, dynamic=False)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = functional.linear(x, weight).chunk(2, -1)
    return functional.silu(gate) * up


def linears(rows: int) -> Iterator[Case]:
    triton = opset_of("triton")
    for name, (n, k, is_gated) in SHAPES.items():
        weight = (torch.randn(n * (1 + is_gated), k, device="cuda") / k**0.5).bfloat16()
        x = torch.randn(rows, k, device="cuda").bfloat16()
        activation = "silu_and_mul" if is_gated else None
        baselines = {"vendor": gated if is_gated else functional.linear}
        if rows <= 64:  # above, our CUDA path is the vendor's

            def ours_in_cuda(x: Tensor, w: Tensor, activation: str | None = activation) -> Tensor:
                assert NATIVE.linear is not None
                return NATIVE.linear(x, w, None, None, activation)

            baselines["our CUDA"] = ours_in_cuda
        yield Case(
            f"{name} m={rows}",
            inputs=(x, weight),
            ours=lambda x, w, a=activation: triton.linear(x, w, None, None, a),
            baselines=baselines,
            bytes_moved=weight.nbytes if rows <= 64 else None,
            flops=None if rows <= 64 else 2 * rows * weight.numel(),
        )


def packed_linears(rows: int) -> Iterator[Case]:
    """4 bits in groups of 128 columns, and e4m3 with a scale a row."""
    for name, (n, k, is_gated) in SHAPES.items():
        n *= 1 + is_gated
        tiles = (-(-n // 16), k // 128, 16)
        codes = torch.randint(0, 256, (tiles[0], 16 * k // 2), dtype=torch.uint8, device="cuda")
        scales = (torch.rand(tiles, device="cuda") + 0.5) / (8 * k**0.5)
        zeros = torch.full(tiles, 8, dtype=torch.uint8, device="cuda")
        x = torch.randn(rows, k, device="cuda").bfloat16()
        yield Case(
            f"{name} in 4 bits m={rows}",
            inputs=(x, codes, scales, zeros),
            ours=lambda x, w, s, z, n=n: group_linear(x, w, "U4", n, s, z),
            baselines={"our CUDA": lambda x, w, s, z, n=n: quant_linear(x, w, "U4", n, s, z)},
            bytes_moved=codes.nbytes + scales.nbytes if rows <= 64 else None,
            flops=None if rows <= 64 else 2 * rows * n * k,
        )
        del codes
        halves = [torch.randn(count, k, device="cuda").bfloat16() for count in (rows, n)]
        inputs = [one for half in halves for one in ops.quantize_rows(half, torch.float8_e4m3fn)]
        yield Case(
            f"{name} in e4m3 m={rows}",
            inputs=tuple(inputs),
            ours=lambda *args: scaled_linear(*args, torch.bfloat16),
            baselines={
                "our CUDA": lambda *args: ops.scaled_linear(*args, torch.bfloat16),
                "vendor": lambda q, s, w, ws: torch._scaled_mm(
                    q, w.T, s, ws.T, out_dtype=torch.bfloat16
                ),
            },
            bytes_moved=inputs[2].nbytes if rows <= 64 else None,
        )


def quant_linear(
    x: Tensor, w: Tensor, format: str, n: int, scales: Tensor, zeros: Tensor
) -> Tensor:
    return ops.quant_linear(x, w, format, n, None, False, scales, zeros)


def split(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.split((HEADS, HEADS_KV, HEADS_KV), 1)


def heads_first(qkv: Tensor) -> Iterator[Tensor]:
    return (x[None].transpose(1, 2) for x in split(qkv))


def sdpa(qkv: Tensor, _: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def varlen(ops: Callable[..., Tensor], length: int) -> Callable[..., Tensor]:
    return lambda qkv, starts: ops(*split(qkv), starts, length, *SCORES)


def flex(length: int) -> Callable[..., Tensor]:
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length)

    def run(qkv: Tensor, _: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        return _flex(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run


def prompts(lengths: tuple[int, ...], flexed: tuple[int, ...]) -> Iterator[Case]:
    triton = opset_of("triton")
    for length in lengths:
        qkv = torch.randn(length, HEADS + 2 * HEADS_KV, HEAD_DIM, device="cuda").bfloat16()
        starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        baselines = {"our CUDA": varlen(NATIVE.flash_attn_varlen, length), "vendor": sdpa}
        if length in flexed:
            baselines["FlexAttention"] = flex(length)
        yield Case(
            f"prompt of {length}",
            inputs=(qkv, starts),
            ours=varlen(triton.flash_attn_varlen, length),
            baselines=baselines,
            flops=2 * length * length * HEADS * HEAD_DIM,
        )


def paged(ops: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, *more: ops(q, k, v, *more[:3], 1, *SCORES)


def decode_sdpa(q: Tensor, *inputs: Tensor) -> Tensor:
    k, v = inputs[-2:]
    return functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def decode_flex(q: Tensor, *inputs: Tensor) -> Tensor:
    return _flex(q[:, :, None], *inputs[-2:], enable_gqa=True)[:, :, 0]


def decodes(cases: tuple[tuple[int, int], ...]) -> Iterator[Case]:
    triton = opset_of("triton")
    for batch, keys in cases:
        pages = -(-keys // PAGE_SIZE)
        shape = (batch * pages, PAGE_SIZE, HEADS_KV, HEAD_DIM)
        caches = [torch.randn(shape, device="cuda").bfloat16() for _ in range(2)]
        table = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
        contiguous = [
            x[table.long()].view(batch, -1, *shape[2:])[:, :keys].transpose(1, 2).contiguous()
            for x in caches
        ]
        lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        q = torch.randn(batch, HEADS, HEAD_DIM, device="cuda").bfloat16()

        yield Case(
            f"attention of {batch} queries over {keys} keys",
            inputs=(q, *caches, table, lengths, starts, *contiguous),
            ours=paged(triton.paged_attention),
            baselines={
                "our CUDA": paged(NATIVE.paged_attention),
                "vendor": decode_sdpa,
                "FlexAttention": decode_flex,
            },
            bytes_moved=2 * contiguous[0].nbytes,
        )


@torch.inference_mode()
def measure(_: int, quick: bool) -> list[harness.Row]:
    def cases() -> Iterator[Case]:
        for rows in ROWS[:1] if quick else ROWS:
            yield from linears(rows)
            if rows != 512:
                yield from packed_linears(rows)
        yield from decodes(DECODES[:1] if quick else DECODES)
        yield from prompts(PROMPTS[:1] if quick else PROMPTS, PROMPTS[::2])

    rows = []
    for case in cases():
        rows.append(harness.measure(case, torch.device("cuda"), rounds=3 if quick else 10))
        harness.print_rows(rows[-1:])
    return rows


if __name__ == "__main__":
    run_on_gpu("triton", __doc__, measure)
