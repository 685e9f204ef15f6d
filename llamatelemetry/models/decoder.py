"""A patched model over packed tokens: what the engine runs, records and captures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.models.families import family_of
from llamatelemetry.models.hf_overrides import in_force
from llamatelemetry.models.opset import OpSet
from llamatelemetry.models.pieces.attention import Attention, rope_angles
from llamatelemetry.models.pieces.base import Piece, has_hooks
from llamatelemetry.models.pieces.layer import DecoderLayer, add_norm, norm_of, number_of
from llamatelemetry.models.pieces.norm import eps_of
from llamatelemetry.models.spec import LayerSpec
from llamatelemetry.models.step_input import DecoderState, StepInput


@dataclass
class Block:
    """One decoder layer: its pieces, and the norm that follows it."""

    layer: DecoderLayer
    attention: Attention
    mlp: Callable[[Tensor], Tensor]
    next_norm: Any  # the next layer's first, or the model's last


class Decoder:
    """Embedding, blocks, final norm and vocabulary projection of a patched model."""

    def __init__(
        self,
        model: Any,
        spec: LayerSpec,
        ops: OpSet,
        blocks: Sequence[Block],
        pieces: Mapping[str, Piece],
    ) -> None:
        base = model.model
        self.model, self.base, self.pieces = model, base, pieces
        self._bound = [(model._modules, "model", base)]
        self._bound += [(base._modules, name, getattr(base, name)) for name in ("layers", "norm")]
        self._bound += [(base.layers._modules, *item) for item in base.layers._modules.items()]
        called = [base.embed_tokens, model.lm_head, base.rotary_emb]
        called += [
            getattr(layer, spec.mlp)
            for i, layer in enumerate(base.layers)
            if f"model.layers.{i}.{spec.mlp}" not in pieces
        ]
        inside = {part for module in called for part in module.modules()}
        self._left_out = [
            (part._forward_hooks, part._forward_pre_hooks, name)
            for name, part in model.named_modules()
            if part not in inside
        ]
        self.ops, self.blocks = ops, list(blocks)
        self.first_norm = norm_of(base.layers[0], spec.first_norm)
        self.embedding_multiplier = number_of(base, spec.embedding_multiplier)
        self.logits_scaling = number_of(model.config, spec.logits_scaling)

    def why_not(self) -> str | None:
        """What of the model as it is now the packed forward would leave out; None if nothing."""
        for before, after, name in self._left_out:
            if (before or after) and has_hooks(before, after):
                return f"{name or 'the model'} carries forward hooks, which the engine does not run"
        for entries, key, module in self._bound:
            if entries.get(key) is not module:
                return f"{key} of the model's modules has been replaced since patch"
        for name, piece in self.pieces.items():
            if (part := piece.changed()) is not None:
                return f"{name}.{part} has been replaced or hooked since patch"
        for block in self.blocks:
            if (changed := in_force(block.attention.module)) is not None:
                return f"the engine does not know of {changed}: disable_flash_attention undoes it"
        return None

    def forward(self, input_ids: Tensor, step: StepInput, state: DecoderState) -> Tensor:
        """Logits of the last token of each sequence, [batch, vocab_size]."""
        ops, last = self.ops, self.blocks[-1]
        residual = self.base.embed_tokens(input_ids)
        if self.embedding_multiplier != 1.0:
            residual = residual * self.embedding_multiplier
        x, norm = residual, self.first_norm
        if norm is not None:
            x = ops.rms_norm(residual, norm.weight, eps_of(norm))
        for block, (k_cache, v_cache) in zip(self.blocks, state.caches, strict=True):
            attend = partial(
                block.attention.step,
                step=step,
                rope=state.rope[0],
                k_cache=k_cache,
                v_cache=v_cache,
            )
            x = block.layer.run(x, residual, attend, block.mlp)
            if block is last and step.max_seqlen_q > 1:
                ends = step.cu_seqlens_q[1:] - 1
                x, residual = x[ends], residual[ends]
            x = add_norm(ops, x, residual, block.next_norm)
        logits = self.model.lm_head(x)
        return logits if self.logits_scaling == 1.0 else logits / self.logits_scaling


def rope_tables(model: Any, num_positions: int) -> list[tuple[Tensor, Tensor]]:
    """Tables of each kind of rotary embedding that the model's layers use, from its own module.

    Returns:
        cos and sin [num_positions or more, rotary_dim] each.

    Raises:
        ValueError: a rotary embedding whose table changes with the sequence length.
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
    return [rope_angles(family_of(model).spec, cos[0], sin[0])]
