"""Writes to paged key and value caches in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def append_kv_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    page_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < k_cache.shape[0] * page_size:
            k_cache[slot // page_size, slot % page_size] = k[token]
            v_cache[slot // page_size, slot % page_size] = v[token]


def copy_blocks_(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> None:
    num_blocks = k_cache.shape[0]
    for src, dst in block_pairs.tolist():
        if 0 <= src < num_blocks and 0 <= dst < num_blocks:
            k_cache[dst] = k_cache[src]
            v_cache[dst] = v_cache[src]
