"""A patched model over packed tokens: what the engine runs, records and captures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.models.layers import Attention, Family, number_of
from llamatelemetry.models.step_input import DecoderState, StepInput

_fused_add_rms_norm = torch.ops.llamatelemetry.fused_add_rms_norm_.default
_rms_norm = torch.ops.llamatelemetry.rms_norm.default


@dataclass
class Block:
    """One decoder layer: its pieces, and the norm that follows each."""

    attention: Attention
    mlp: Callable[[Tensor], Tensor]
    middle_norm: Any  # between attention and MLP
    next_norm: Any  # the next layer's first, or the model's last


class Decoder:
    """Embedding, blocks, final norm and vocabulary projection of a patched model."""

    def __init__(self, model: Any, family: Family, blocks: Sequence[Block]) -> None:
        base = model.model
        self.embed, self.lm_head = base.embed_tokens, model.lm_head
        self.first_norm = base.layers[0].input_layernorm
        self.blocks = list(blocks)
        self.embedding_multiplier = number_of(base, family.embedding_multiplier)
        self.residual_multiplier = number_of(base.layers[0], family.residual_multiplier)
        self.logits_scaling = number_of(model.config, family.logits_scaling)

    def forward(self, input_ids: Tensor, step: StepInput, state: DecoderState) -> Tensor:
        """Logits of the last token of each sequence, [batch, vocab_size]."""
        residual = self.embed(input_ids)
        if self.embedding_multiplier != 1.0:
            residual = residual * self.embedding_multiplier
        multiplier = self.residual_multiplier
        last = self.blocks[-1]
        x = _rms_norm(residual, self.first_norm.weight, self.first_norm.variance_epsilon)
        for block, (k_cache, v_cache) in zip(self.blocks, state.caches, strict=True):
            x = block.attention.step(x, step, state.rope[0], k_cache, v_cache)
            if multiplier != 1.0:
                x = x * multiplier
            norm = block.middle_norm
            _fused_add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
            x = block.mlp(x)
            if multiplier != 1.0:
                x = x * multiplier
            if block is last and step.max_seqlen_q > 1:
                ends = step.cu_seqlens_q[1:] - 1
                x, residual = x[ends], residual[ends]
            norm = block.next_norm
            _fused_add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
        logits = self.lm_head(x)
        return logits if self.logits_scaling == 1.0 else logits / self.logits_scaling


def rope_tables(model: Any, num_positions: int) -> list[tuple[Tensor, Tensor]]:
    """cos and sin [num_positions or more, rotary_dim] of each kind of rotary embedding that the
    model's layers use, from its own module.

    Raises: ValueError for a rotary embedding whose table changes with the sequence length
    """
    config, rotary = model.config, model.model.rotary_emb
    kind = rotary.rope_type
    original = config.rope_parameters.get("original_max_position_embeddings")
    if "dynamic" in kind or (kind == "longrope" and num_positions > (original or 0)):
        limit = f"; at most {original} positions have one" if kind == "longrope" else ""
        raise ValueError(
            f"rope_type must have one table for every sequence length, got {kind!r} and "
            f"{num_positions} positions{limit}"
        )
    like = model.model.norm.weight
    positions = torch.arange(max(num_positions, 1), device=like.device)
    cos, sin = rotary(like, positions.unsqueeze(0))
    return [(cos[0], sin[0])]
