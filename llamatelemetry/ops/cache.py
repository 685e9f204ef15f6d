"""Cache writes: append keys and values to their slots, copy whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake


def append_kv_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Writes each token's keys and values to its slot: ``cache[slot // page, slot % page] = k[t]``.

    k, v:     [num_tokens, num_heads_kv, head_dim], float32, float16 or bfloat16; any token and head
              strides (slices of a merged qkv), last dimension contiguous
    k_cache, v_cache: [num_blocks, page_size, num_heads_kv, head_dim], dtype and device of k,
              written in place; any page_size, any block and slot strides, heads contiguous
    slot_mapping: [num_tokens] int64, block * page_size + offset; -1 skips the token. Slots of one
              call must differ. Any other value outside the cache is a mistake that nothing can
              report, for it lies on the device: such a token is skipped too
    Raises:   RuntimeError naming the argument, the rule and the value
    """
    inference_only("append_kv_", k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    torch.ops.llamatelemetry.append_kv_.default(k, v, k_cache, v_cache, slot_mapping)


@register_fake("append_kv_")
def _(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    return None


def copy_blocks_(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> None:
    """Copies whole blocks within a cache: ``cache[dst] = cache[src]`` for each pair, K and V.

    k_cache, v_cache: [num_blocks, page_size, num_heads_kv, head_dim], float32, float16 or bfloat16,
              written in place; any page_size, any block and slot strides, heads contiguous
    block_pairs: [num_pairs, 2] int64, (src, dst). All pairs run at once: no dst may be another
              pair's src or dst. A pair outside the cache is skipped, so (-1, -1) pads
    Raises:   RuntimeError naming the argument, the rule and the value
    """
    inference_only("copy_blocks_", k_cache=k_cache, v_cache=v_cache)
    torch.ops.llamatelemetry.copy_blocks_.default(k_cache, v_cache, block_pairs)


@register_fake("copy_blocks_")
def _(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> None:
    return None
