"""What one forward over packed tokens reads besides the tokens, and what outlives a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class StepInput:
    """Where the packed tokens of one forward stand.

    Attributes:
        positions: [num_tokens] int64, the row of cos and sin of each token
        slot_mapping: [num_tokens] int64, where its keys and values go; -1 skips
        block_table: [batch, max_blocks] int32
        cache_seqlens: [batch] int32, keys of each sequence, those of this step included
        cu_seqlens_q: [batch + 1] int32, where each sequence's tokens begin; every one has some
        max_seqlen_q: most tokens that one sequence has in this step; 1 is a decode step
        is_whole: whether every sequence begins with this step: its keys are this step's own
        kept: [num_kept] int64, the tokens whose logits are asked for; None for each sequence's last
        embedded: [num_tokens, hidden_size], the tokens as the first layer takes them, which a
            forward writes over; None has it look them up
        split_size: where attention's kernels of few queries cut the keys, as in paged_attention; 0
            leaves it to them
        keeps_all: whether the logits of all tokens are asked for
        parts: where the tokens of some sequences begin and end, and what attention reads of those
            alone, in order: kernels that suit one decoded token do not suit a prompt; empty for
            all alike
    """

    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    is_whole: bool
    kept: Tensor | None = None
    embedded: Tensor | None = None
    split_size: int = 0
    keeps_all: bool = False
    parts: Sequence[tuple[int, int, StepInput]] = ()


@dataclass(frozen=True)
class DecoderState:
    """What stays the same from one forward of a model to the next.

    Attributes:
        caches: (k_cache, v_cache) of each layer, [num_blocks, page_size, num_heads_kv, head_dim];
            of 8 bits (k_cache, v_cache, k_scales, v_scales)
        rope: (cos, sin) of each kind of rotary embedding that the model's layers use, [positions,
            rotary_dim] in the model's dtype, from rope_tables
    """

    caches: Sequence[tuple[Tensor, ...]]
    rope: Sequence[tuple[Tensor, Tensor]]
