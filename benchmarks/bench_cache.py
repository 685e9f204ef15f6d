"""Cache writes against torch's index_copy_, which needs no skipping: all slots are used; slots
against the few torch ops that would compute them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor

from llamatelemetry import ops
from llamatelemetry.ops.reference.cache import quantised

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


def append_8_bit(device: torch.device, num_tokens: int, stored: torch.dtype) -> Case:
    """Llama-3-8B's heads, each row with a scale of its own, beside the same in torch's ops."""
    heads, head_dim = 8, 128
    num_blocks = 2 * (num_tokens + PAGE_SIZE - 1) // PAGE_SIZE + 8
    qkv = torch.randn(num_tokens, 5, heads, head_dim, device=device).bfloat16()
    caches = torch.zeros(2, num_blocks, PAGE_SIZE, heads, head_dim, device=device).to(stored)
    scales = torch.zeros(2, num_blocks, PAGE_SIZE, heads, device=device)
    slots = torch.randperm(num_blocks * PAGE_SIZE, device=device)[:num_tokens]

    def ours(qkv: Tensor, k: Tensor, v: Tensor, slots: Tensor, *scales: Tensor) -> list[Tensor]:
        ops.append_kv_(qkv[:, 3], qkv[:, 4], k, v, slots, *scales)
        return [x.view(torch.uint8) for x in (k, v)]

    def theirs(qkv: Tensor, k: Tensor, v: Tensor, slots: Tensor, *scales: Tensor) -> list[Tensor]:
        for i, (cache, scale) in enumerate(zip((k, v), scales, strict=True)):
            rows, row_scales = quantised(qkv[:, 3 + i], stored)
            cache.view(torch.uint8).flatten(0, 1)[slots] = rows.view(torch.uint8)
            scale.flatten(0, 1)[slots] = row_scales
        return [x.view(torch.uint8) for x in (k, v)]

    return Case(
        f"append_kv_ {num_tokens}x{heads}x{head_dim} bfloat16 to {str(stored)[6:]}",
        inputs=(qkv, *caches, slots, *scales),
        ours=ours,
        baselines={"torch": theirs},
        bytes_moved=2 * (qkv[:, 3].nbytes + num_tokens * heads * (head_dim + 4)),
    )


def rope_append_kv(device: torch.device, num_tokens: int, norms: bool) -> Case:
    """Llama-3-8B's heads (with norms Qwen3-8B's): beside it what it is made of."""
    heads, head_dim = [32, 8, 8], 128
    num_blocks = 2 * (num_tokens + PAGE_SIZE - 1) // PAGE_SIZE + 8
    qkv = torch.randn(num_tokens, sum(heads), head_dim, device=device).bfloat16()
    caches = torch.zeros(2, num_blocks, PAGE_SIZE, heads[1], head_dim, device=device).bfloat16()
    slots = torch.randperm(num_blocks * PAGE_SIZE, device=device)[:num_tokens]
    angles = torch.rand(4096, head_dim, device=device) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    positions = torch.randint(0, 4096, (num_tokens,), device=device)
    weights = torch.ones(2, head_dim, device=device).bfloat16()

    def ours(qkv: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        cos, sin, positions, k_cache, v_cache, slots = tensors
        weight = weights if norms else (None, None)
        ops.rope_append_kv_(qkv, cos, sin, positions, False, k_cache, v_cache, slots, *weight)
        return *qkv.split(heads, 1)[:2], k_cache, v_cache

    def theirs(qkv: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        cos, sin, positions, k_cache, v_cache, slots = tensors
        q, k, v = qkv.split(heads, 1)
        if norms:
            q, k = (ops.rms_norm(qkv, weights[i], 1e-6).split(heads, 1)[i] for i in range(2))
        ops.rotary_embedding_(q, k, cos, sin, positions)
        ops.append_kv_(k, v, k_cache, v_cache, slots)
        return q, k, k_cache, v_cache

    return Case(
        f"rope_append_kv_ {num_tokens} tokens{', norms' if norms else ''} bfloat16",
        inputs=(qkv, cos, sin, positions, *caches, slots),
        ours=ours,
        baselines={"op by op": theirs},
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


def swap_blocks(device: torch.device, num_pairs: int, to_host: bool) -> Case:
    """Scattered pages of one layer of Llama-3-8B to and from the host's memory. What torch copies
    at once must lie in one piece there, so ours puts them there too."""
    shape = (2 * num_pairs + 8, PAGE_SIZE, 8, 128)
    caches = torch.randn(2, *shape, device=device).bfloat16()
    blocks = torch.stack([torch.randperm(shape[0])[:num_pairs], torch.arange(num_pairs)], 1)
    pairs = (blocks if to_host else blocks.flip(1)).contiguous().to(device)
    host = torch.randn(2, num_pairs, *shape[1:]).bfloat16()
    hosts = [x.pin_memory() if device.type == "cuda" else x for x in (host, host.clone())]

    def ours(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> tuple[Tensor, ...]:
        planes = (k_cache, v_cache, *hosts[0]) if to_host else (*hosts[0], k_cache, v_cache)
        ops.swap_blocks_(*planes, pairs)
        return planes[2:]

    def theirs(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> tuple[Tensor, ...]:
        for there, cache in zip(hosts[1], (k_cache, v_cache), strict=True):
            if to_host:
                there.copy_(cache[pairs[:, 0]], non_blocking=True)
            else:
                cache.index_copy_(0, pairs[:, 1], there.to(device, non_blocking=True))
        return tuple(hosts[1]) if to_host else (k_cache, v_cache)

    def check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    return Case(
        f"swap_blocks_ {num_pairs} {'to' if to_host else 'from'} the host bfloat16",
        inputs=(*caches, pairs),
        ours=ours,
        baselines={"one copy": theirs},
        check=check,
    )


def slot_mapping(device: torch.device, batch: int, tokens_each: int) -> Case:
    max_blocks = -(-tokens_each // PAGE_SIZE)
    table = torch.randperm(batch * max_blocks, device=device).int().view(batch, max_blocks)
    positions = torch.arange(tokens_each, device=device).repeat(batch)
    starts = torch.arange(batch + 1, device=device, dtype=torch.int32) * tokens_each

    def ours(positions: Tensor, table: Tensor, starts: Tensor) -> Tensor:
        return ops.slot_mapping(positions, table, starts, PAGE_SIZE)

    def theirs(positions: Tensor, table: Tensor, starts: Tensor) -> Tensor:
        tokens = torch.arange(batch * tokens_each, device=device)
        rows = torch.searchsorted(starts.long(), tokens, right=True) - 1
        blocks = table[rows, positions // PAGE_SIZE].long()
        return blocks * PAGE_SIZE + positions % PAGE_SIZE

    return Case(
        f"slot_mapping {batch}x{tokens_each}",
        inputs=(positions, table, starts),
        ours=ours,
        baselines={"torch": theirs},
        bytes_moved=2 * positions.nbytes,
    )


def advance_step(device: torch.device, batch: int, max_blocks: int) -> Case:
    ids, next_ids, positions = torch.randint(100, (3, batch), device=device)
    table = torch.randperm(batch * max_blocks, device=device).int().view(batch, max_blocks)
    inputs = (ids, positions, positions + 0, positions.int() + 1, positions * 0, next_ids)
    active = torch.ones(batch, dtype=torch.bool, device=device)

    def ours(*args: Tensor) -> tuple[Tensor, ...]:
        ops.advance_step_(*args, PAGE_SIZE)
        return args[:5]

    def theirs(*args: Tensor) -> tuple[Tensor, ...]:
        ids, positions, slots, lengths, offsets, next_ids, active, table = args
        ids.copy_(next_ids)
        for counter in (positions, lengths, offsets):
            counter.add_(active)
        index = (positions // PAGE_SIZE).clamp(max=max_blocks - 1).unsqueeze(1)
        blocks = table.gather(1, index).squeeze(1).long()
        inside = active & (positions < max_blocks * PAGE_SIZE)
        slots.copy_(torch.where(inside, blocks * PAGE_SIZE + positions % PAGE_SIZE, -1))
        return args[:5]

    return Case(
        f"advance_step_ {batch}",
        inputs=(*inputs, active, table),
        ours=ours,
        baselines={"torch": theirs},
        bytes_moved=2 * sum(x.nbytes for x in inputs),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for num_tokens, heads, head_dim in [(1, 3, 64), (128, 3, 64), (64, 8, 128), (4096, 8, 128)]:
        yield append_kv(device, num_tokens, heads, head_dim)
        if quick:
            return
    for num_tokens in (64, 4096):
        for stored in (torch.float8_e4m3fn, torch.int8):
            yield append_8_bit(device, num_tokens, stored)
    for num_tokens in (1, 32, 2048):
        yield rope_append_kv(device, num_tokens, norms=False)
        yield rope_append_kv(device, num_tokens, norms=True)
    for num_pairs in (1, 64):
        yield copy_blocks(device, num_pairs, 8, 128)
    for num_pairs in (1, 64, 512):
        yield swap_blocks(device, num_pairs, to_host=True)
        yield swap_blocks(device, num_pairs, to_host=False)
    for batch, tokens_each in [(1, 128), (8, 2048)]:
        yield slot_mapping(device, batch, tokens_each)
    for batch in (1, 64):
        yield advance_step(device, batch, 4096 // PAGE_SIZE)


if __name__ == "__main__":
    main("cache", cases)
