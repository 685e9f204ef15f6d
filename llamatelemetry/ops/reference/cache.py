"""Writes to paged key and value caches in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops.reference.norm import rms_norm, rotary_embedding_


def append_kv_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    page_size = k_cache.shape[1]
    planes = ((k, k_cache, k_scales), (v, v_cache, v_scales))
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < k_cache.shape[0] * page_size:
            at = slot // page_size, slot % page_size
            for x, cache, scales in planes:
                row = x[token]
                if scales is not None and scales.dim() == 1:
                    row = in_8_bits(row, scales, cache.dtype)
                elif scales is not None:
                    row, scales[at] = quantised(row, cache.dtype)
                cache[at] = row


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] as float8_e4m3fn or int8, and the float32 scales that give it back."""
    largest = x.float().abs().amax(-1).clamp(min=2.0**-100)
    # A number over a tensor would be the number times its reciprocal.
    limit = torch.full_like(largest, _largest(dtype))
    scales = (largest / limit).masked_fill(~x.isfinite().all(-1), torch.nan)
    factor = (limit / largest).unsqueeze(-1)
    return _rounded(x.float() * factor, dtype), scales


def in_8_bits(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / scale`` as float8_e4m3fn or int8, one scale for all."""
    return _rounded(x.float() * (torch.ones_like(scale) / scale), dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest, at most the type's largest; NaN is 0 in int8."""
    limit = _largest(dtype)
    x = (x.round() if dtype == torch.int8 else x).clamp(-limit, limit)
    return (x.nan_to_num(0.0) if dtype == torch.int8 else x).to(dtype)


def _largest(dtype: torch.dtype) -> float:
    return 127.0 if dtype == torch.int8 else 448.0


def rope_append_kv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    num_heads_kv = k_cache.shape[2]
    q, k, v = qkv.split([qkv.shape[1] - 2 * num_heads_kv, num_heads_kv, num_heads_kv], 1)
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            x.copy_(rms_norm(x, weight, eps, weight_offset))
    rotary_embedding_(q, k, cos, sin, positions, interleaved)
    append_kv_(k, v, k_cache, v_cache, slot_mapping, k_scales, v_scales)


def copy_blocks_(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> None:
    num_blocks = k_cache.shape[0]
    for src, dst in block_pairs.tolist():
        if 0 <= src < num_blocks and 0 <= dst < num_blocks:
            k_cache[dst] = k_cache[src]
            v_cache[dst] = v_cache[src]


def swap_blocks_(
    k_from: Tensor, v_from: Tensor, k_to: Tensor, v_to: Tensor, block_pairs: Tensor
) -> None:
    for src, dst in block_pairs.tolist():
        if 0 <= src < len(k_from) and 0 <= dst < len(k_to):
            k_to[dst] = k_from[src]
            v_to[dst] = v_from[src]


def slot_mapping(
    positions: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, page_size: int
) -> Tensor:
    slots = torch.full_like(positions, -1)
    starts = cu_seqlens_q.tolist()
    for table, begin, end in zip(block_table.tolist(), starts[:-1], starts[1:], strict=True):
        for token in range(begin, end):
            position = int(positions[token])
            if 0 <= position < len(table) * page_size and table[position // page_size] >= 0:
                block = table[position // page_size]
                slots[token] = block * page_size + position % page_size
    return slots


def advance_step_(
    input_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_seqlens: Tensor,
    offsets: Tensor,
    next_ids: Tensor,
    active: Tensor,
    block_table: Tensor,
    page_size: int,
) -> None:
    starts = torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
    slots.copy_(slot_mapping(positions + 1, block_table, starts, page_size))
    slots.masked_fill_(~active, -1)
    goes_on = slots >= 0
    input_ids.copy_(torch.where(goes_on, next_ids, input_ids))
    for counter in (positions, cache_seqlens, offsets):
        counter += goes_on.to(counter.dtype)
