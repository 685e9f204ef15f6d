"""flash_attn against scaled_dot_product_attention: cuDNN's and torch's flash kernels on the GPU.

On the GPU 16384 tokens of hidden size 2048 in bfloat16, cut into ever longer sequences; causal
counts half the FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, assert_close, main
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llamatelemetry.ops import flash_attn, flash_attn_varlen

TOKENS, HIDDEN = 16384, 2048
WINDOW = 1024
VARLEN = [8192, 128, 3000, 1024, 512, 2048, 256, 1224]  # 16384 in all


def ours(**options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: flash_attn(q, k, v, **options)[0]


def sdpa(causal: bool, backend: SDPBackend | None = None) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        if backend is None:
            return attend(*heads_first, is_causal=causal).transpose(1, 2)
        with sdpa_kernel(backend):
            return attend(*heads_first, is_causal=causal).transpose(1, 2)

    return run


def seen_keys(seqlen: int, window: int) -> int:
    """Pairs of query and key of one causal sequence with a window."""
    return sum(min(i + 1, window + 1) for i in range(seqlen))


def dense_cases(quick: bool) -> Iterator[Case]:
    seqlens = [1024] if quick else [512, 1024, 2048, 4096, 8192, 16384]
    for head_dim in (64, 128, 256):
        for causal in (True, False):
            for seqlen in seqlens:
                shape = (TOKENS // seqlen, seqlen, HIDDEN // head_dim, head_dim)
                qkv = tuple(torch.randn(shape, device="cuda").bfloat16() for _ in range(3))
                name = f"{'causal' if causal else 'full'} hd{head_dim} {seqlen}"
                flops = 4 * TOKENS * seqlen * HIDDEN // (2 if causal else 1)
                flash = sdpa(causal, SDPBackend.FLASH_ATTENTION)
                cudnn = sdpa(causal, SDPBackend.CUDNN_ATTENTION)
                yield Case(
                    name, qkv, ours(causal=causal), {"cudnn": cudnn, "flash": flash}, flops=flops
                )
                if head_dim < 256 and 1024 <= seqlen <= 8192:
                    sm80 = ours(causal=causal, backend="sm80")
                    yield Case(f"sm80 {name}", qkv, sm80, {"flash": flash}, flops=flops)


def packed_case() -> Case:
    """Sequences of mixed lengths, packed, beside cuDNN one sequence after the other."""
    q, k, v = (torch.randn(TOKENS, 16, 128, device="cuda").bfloat16() for _ in range(3))
    starts = torch.tensor([0, *VARLEN], device="cuda").cumsum(0).int()

    def packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        sizes = {"max_seqlen_q": max(VARLEN), "max_seqlen_k": max(VARLEN)}
        return flash_attn_varlen(q, k, v, starts, starts, causal=True, **sizes)[0]

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        attend = sdpa(True, SDPBackend.CUDNN_ATTENTION)
        parts = zip(*(x.split(VARLEN) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*(x[None] for x in part))[0] for part in parts])

    flops = sum(2 * n * n * HIDDEN for n in VARLEN)
    name = f"varlen causal hd128 {min(VARLEN)}..{max(VARLEN)}"
    return Case(name, (q, k, v, starts), packed, {"cudnn one by one": one_by_one}, flops=flops)


def window_case() -> Case:
    """A window beside the same attention without it; masks make torch slower than no window."""
    qkv = tuple(torch.randn(1, TOKENS, 16, 128, device="cuda").bfloat16() for _ in range(3))
    windowed = ours(causal=True, window_size=(WINDOW, 0))
    other_kernel = ours(causal=True, window_size=(WINDOW, 0), backend="sm80")
    return Case(
        f"window {WINDOW} causal hd128 {TOKENS}",
        qkv,
        windowed,
        {
            "ours without a window": ours(causal=True),
            "cudnn without a window": sdpa(True, SDPBackend.CUDNN_ATTENTION),
        },
        flops=4 * HIDDEN * seen_keys(TOKENS, WINDOW),
        # Timed beside another function, checked against another kernel of the same.
        check=lambda out, _: assert_close(out, other_kernel(*qkv)),
    )


def cpu_cases(quick: bool) -> Iterator[Case]:
    num_heads = 4
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 128):
            for causal in (True, False):
                for seqlen in [1024] if quick else [1024, 2048, 4096]:
                    shape = (1, seqlen, num_heads, head_dim)
                    qkv = tuple(torch.randn(shape).to(dtype) for _ in range(3))
                    yield Case(
                        f"{'causal' if causal else 'full'} hd{head_dim} {seqlen} {str(dtype)[6:]}",
                        qkv,
                        ours(causal=causal),
                        {"sdpa": sdpa(causal)},
                        flops=4 * num_heads * head_dim * seqlen**2 // (2 if causal else 1),
                        flops_dtype=dtype,
                    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    if device.type == "cpu":
        yield from cpu_cases(quick)
        return
    yield from dense_cases(quick)
    yield packed_case()
    yield window_case()


if __name__ == "__main__":
    main("flash_attn", cases)
