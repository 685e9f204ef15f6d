"""The table that maps Hugging Face classes to our ops, and putting it in place and out again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.models.decoder import Block, Decoder, rope_tables
from llamatelemetry.models.hf_attention import NAME, register
from llamatelemetry.models.layers import Attention, DecoderLayer, Family, GatedMlp, Piece, RmsNorm
from llamatelemetry.models.probe import disagreement, likeness
from llamatelemetry.models.step_input import DecoderState, StepInput

__all__ = [
    "FAMILIES",
    "PatchReport",
    "forward_tokens",
    "patch",
    "rope_tables",
    "unpatch",
]

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


# What stands for what in a decoder layer; "" is the layer itself.
_LAYER: dict[str, type[Piece]] = {
    "input_layernorm": RmsNorm,
    "post_attention_layernorm": RmsNorm,
    "self_attn": Attention,
    "mlp": GatedMlp,
    "": DecoderLayer,
}


@dataclass
class PatchReport:
    """What patch replaced, and what it did not.

    replaced: how often each piece stands for a module
    refused:  module name -> why it stays as it was
    """

    replaced: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class _Patched:
    report: PatchReport
    pieces: dict[str, Piece]
    decoder: Decoder | None
    attn_implementation: str


@torch.no_grad()
def patch(model: Any) -> PatchReport:
    """Puts our ops in the place of a transformers model's modules, in place; weights are shared.

    Each replacement first has to give what its module gives on random input; one that does not,
    stays out and is named in the report. Layers that differ in their weights alone are tried once.
    While gradients are enabled a replacement hands over to the module's own forward, so call the
    model under torch.no_grad() or torch.inference_mode(), as generate does.

    model:   an instance of a class in FAMILIES, plain or with quantised linears
    Returns: the report; a second call changes nothing and returns it again
    Raises:  ValueError for a model of another class
    """
    family = _family_of(model)
    if (patched := model.__dict__.get("_llamatelemetry")) is not None:
        return patched.report
    register()
    base, report, attn_implementation = (
        model.model,
        PatchReport(),
        model.config._attn_implementation,
    )
    wanted: dict[str, type[Piece]] = {"model.norm": RmsNorm}
    for i in range(len(base.layers)):
        wanted |= {f"model.layers.{i}.{name}".rstrip("."): kind for name, kind in _LAYER.items()}
    pieces: dict[str, Piece] = {}
    verdicts: dict[object, str | None] = {}
    for name, kind in wanted.items():
        module = model.get_submodule(name)
        piece: Piece | None = None
        try:
            piece = kind(module, family, model.config)
            key = likeness(piece)
            if key not in verdicts:
                verdicts[key] = disagreement(piece, base.rotary_emb, base.norm.weight)
            reason = verdicts[key]
        except (AttributeError, ValueError) as error:
            reason = str(error)
        if reason is None and piece is not None:
            pieces[name] = piece
            report.replaced[kind.__name__] += 1
        else:
            report.refused[name] = reason or ""
            if piece is not None:
                piece.unbind()
    for piece in pieces.values():
        piece.install()
    if report.replaced["Attention"]:
        model.set_attn_implementation(NAME)
    decoder = _decoder(model, family, pieces)
    model._llamatelemetry = _Patched(report, pieces, decoder, attn_implementation)
    return report


def unpatch(model: Any) -> None:
    """Undoes patch; a model that is not patched stays as it is."""
    patched: _Patched | None = model.__dict__.pop("_llamatelemetry", None)
    if patched is not None:
        for piece in patched.pieces.values():
            piece.remove()
        model.set_attn_implementation(patched.attn_implementation)


@torch.no_grad()
def forward_tokens(model: Any, input_ids: Tensor, step: StepInput, state: DecoderState) -> Tensor:
    """Logits [batch, vocab_size] of the last token of each sequence; appends to the paged cache."""
    patched: _Patched | None = model.__dict__.get("_llamatelemetry")
    if patched is None or patched.decoder is None:
        reasons = "it is not patched" if patched is None else str(patched.report.refused)
        raise ValueError(f"forward_tokens: model must be patched as a whole, got {reasons}")
    return patched.decoder.forward(input_ids, step, state)


def _decoder(model: Any, family: Family, pieces: dict[str, Piece]) -> Decoder | None:
    """The packed forward, where all that it fuses could be replaced; an MLP may be any module."""
    blocks = []
    layers = model.model.layers
    norms = [layer.input_layernorm for layer in layers] + [model.model.norm]
    for i, layer in enumerate(layers):
        names = (f"model.layers.{i}.{name}".rstrip(".") for name in _LAYER if name != "mlp")
        if any(name not in pieces for name in (*names, "model.norm")):
            return None
        attention, mlp = (pieces.get(f"model.layers.{i}.{name}") for name in ("self_attn", "mlp"))
        assert isinstance(attention, Attention)
        step = mlp.step if isinstance(mlp, GatedMlp) else layer.mlp
        blocks.append(Block(attention, step, layer.post_attention_layernorm, norms[i + 1]))
    return Decoder(model, family, blocks)


def _family_of(model: Any) -> Family:
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"patch: model must be one of {', '.join(FAMILIES)}, got {name}; a further family is "
            "a further row of FAMILIES"
        )
    return FAMILIES[name]
