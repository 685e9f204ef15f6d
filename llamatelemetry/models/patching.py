"""The table that maps Hugging Face classes to our ops, and putting it in place and out again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.models.attention import NAME, StepState, register
from llamatelemetry.models.decoder import Block, Decoder, rope_tables
from llamatelemetry.models.layers import Attention, DecoderLayer, Family, GatedMlp, Piece, RmsNorm

__all__ = ["FAMILIES", "PatchReport", "forward_tokens", "patch", "rope_tables", "unpatch"]

# A row a family: the attributes where it goes beyond Llama.
FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(sliding_window="sliding_window"),
    "Qwen2ForCausalLM": Family(sliding_window="sliding_window"),
    "Qwen3ForCausalLM": Family(
        query_norm="q_norm", key_norm="k_norm", sliding_window="sliding_window"
    ),
    "GraniteForCausalLM": Family(
        residual_multiplier="residual_multiplier",
        embedding_multiplier="embedding_multiplier",
        logits_scaling="logits_scaling",
    ),
}


@dataclass
class PatchReport:
    """What patch replaced, by kind of replacement, and by name and reason what it did not."""

    replaced: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class _Patched:
    report: PatchReport
    pieces: list[Piece]
    decoder: Decoder
    attn_implementation: str


def patch(model: Any) -> PatchReport:
    family = _family_of(model)
    if (patched := model.__dict__.get("_llamatelemetry")) is not None:
        return patched.report
    report, pieces, blocks = PatchReport(), [], []
    config = model.config
    layers = list(model.model.layers)
    for i, layer in enumerate(layers):
        attention = Attention(layer.self_attn, family, config)
        mlp = GatedMlp(layer.mlp, family, config)
        pieces += [attention, mlp, DecoderLayer(layer, family, config)]
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        pieces += [RmsNorm(norm, family, config) for norm in norms]
        after = layers[i + 1].input_layernorm if i + 1 < len(layers) else model.model.norm
        blocks.append(Block(attention, mlp.step, layer.post_attention_layernorm, after))
    for piece in pieces:
        piece.install()
    register()
    implementation = config._attn_implementation
    model.set_attn_implementation(NAME)
    decoder = Decoder(model, family, blocks)
    model._llamatelemetry = _Patched(report, pieces, decoder, implementation)
    return report


def unpatch(model: Any) -> None:
    patched = model.__dict__.pop("_llamatelemetry", None)
    if patched is not None:
        for piece in patched.pieces:
            piece.remove()
        model.set_attn_implementation(patched.attn_implementation)


@torch.no_grad()
def forward_tokens(model: Any, input_ids: Tensor, step: StepState) -> Tensor:
    """Logits [batch, vocab_size] of the last token of each sequence; appends to the paged cache."""
    patched: _Patched | None = model.__dict__.get("_llamatelemetry")
    if patched is None:
        raise ValueError(
            f"forward_tokens: model must be patched first, got a {type(model).__name__}"
        )
    return patched.decoder.forward(input_ids, step)


def _family_of(model: Any) -> Family:
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"patch: model must be one of {', '.join(FAMILIES)}, got {name}; a further family is "
            "a further row of FAMILIES"
        )
    return FAMILIES[name]
