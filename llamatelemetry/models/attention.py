"""Attention state of a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class StepState:
    """Where the packed tokens of one forward stand, and the paged cache that holds the others.

    positions:     [num_tokens] int64, the row of cos and sin of each token
    slot_mapping:  [num_tokens] int64, where its keys and values go; -1 skips
    block_table:   [batch, max_blocks] int32
    cache_seqlens: [batch] int32, keys of each sequence, those of this step included
    cu_seqlens_q:  [batch + 1] int32, where each sequence's tokens begin; every one has some
    max_seqlen_q:  most tokens that one sequence has in this step; 1 is a decode step
    caches:        (k_cache, v_cache) of each layer, [num_blocks, page_size, num_heads_kv, head_dim]
    cos, sin:      [positions, rotary_dim] in the model's dtype, from rope_tables
    """

    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    caches: list[tuple[Tensor, Tensor]]
    cos: Tensor
    sin: Tensor
