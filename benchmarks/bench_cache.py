"""Cache writes against torch's index_copy_, which needs no skipping: all slots are used."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor

from llamatelemetry import ops

PAGE_SIZE = 16


def append_kv(device: torch.device, num_tokens: int, heads: int, head_dim: int) -> Case:
    num_blocks = 2 * (num_tokens + PAGE_SIZE - 1) // PAGE_SIZE + 8
    qkv = torch.randn(num_tokens, 5, heads, head_dim, device=device).bfloat16()
    caches = torch.zeros(2, num_blocks, PAGE_SIZE, heads, head_dim, device=device).bfloat16()
    slots = torch.randperm(num_blocks * PAGE_SIZE, device=device)[:num_tokens]

    def ours(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        ops.append_kv_(qkv[:, 3], qkv[:, 4], k_cache, v_cache, slots)
        return k_cache, v_cache

    def theirs(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        k_cache.view(-1, heads, head_dim).index_copy_(0, slots, qkv[:, 3])
        v_cache.view(-1, heads, head_dim).index_copy_(0, slots, qkv[:, 4])
        return k_cache, v_cache

    return Case(
        f"append_kv_ {num_tokens}x{heads}x{head_dim} bfloat16",
        inputs=(qkv, *caches, slots),
        ours=ours,
        baselines={"index_copy_": theirs},
        bytes_moved=2 * 2 * qkv[:, 3].nbytes,
    )


def copy_blocks(device: torch.device, num_pairs: int, heads: int, head_dim: int) -> Case:
    num_blocks = 2 * num_pairs + 8
    caches = torch.randn(2, num_blocks, PAGE_SIZE, heads, head_dim, device=device).bfloat16()
    pairs = torch.randperm(num_blocks, device=device)[: 2 * num_pairs].view(num_pairs, 2)

    def ours(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> tuple[Tensor, ...]:
        ops.copy_blocks_(k_cache, v_cache, pairs)
        return k_cache, v_cache

    def theirs(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> tuple[Tensor, ...]:
        src, dst = pairs.unbind(1)
        k_cache.index_copy_(0, dst, k_cache[src])
        v_cache.index_copy_(0, dst, v_cache[src])
        return k_cache, v_cache

    return Case(
        f"copy_blocks_ {num_pairs}x{PAGE_SIZE}x{heads}x{head_dim} bfloat16",
        inputs=(*caches, pairs),
        ours=ours,
        baselines={"index_copy_": theirs},
        bytes_moved=2 * 2 * num_pairs * PAGE_SIZE * heads * head_dim * 2,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for num_tokens, heads, head_dim in [(1, 3, 64), (128, 3, 64), (64, 8, 128), (4096, 8, 128)]:
        yield append_kv(device, num_tokens, heads, head_dim)
        if quick:
            return
    for num_pairs in (1, 64):
        yield copy_blocks(device, num_pairs, 8, 128)


if __name__ == "__main__":
    main("cache", cases)
