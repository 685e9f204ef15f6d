"""The table that maps Hugging Face classes to our ops, and putting it in place and out again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.models.decoder import Block, Decoder, rope_tables
from llamatelemetry.models.hf_attention import NAME, register
from llamatelemetry.models.layers import Attention, DecoderLayer, Family, GatedMlp, RmsNorm
from llamatelemetry.models.merge import TensorsOf
from llamatelemetry.models.pieces.base import Piece
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
def patch(model: Any, strict: bool = False) -> PatchReport:
    """Puts our ops in the place of a transformers model's modules, in place; weights are shared.

    Each replacement first has to give what its module gives on random input; one that does not,
    stays out, is named in the report and, where it costs the packed forward or a whole kind of
    piece, in a warning. Layers that differ in their weights alone are tried once. While gradients
    are enabled a replacement hands over to the module's own forward, so call the model under
    torch.no_grad() or torch.inference_mode(), as generate does.

    Args:
        model: an instance of a class in FAMILIES, plain or with quantised linears.
        strict: whether a refused piece is an error, raised before anything is changed.

    Returns:
        The report; a second call changes nothing and returns it again.

    Raises:
        ValueError: a model of another class; with strict, a piece that is refused.
    """
    family = _family_of(model)
    if (patched := model.__dict__.get("_llamatelemetry")) is not None:
        return patched.report
    register()
    attn_implementation = model.config._attn_implementation
    wanted: dict[str, type[Piece]] = {"model.norm": RmsNorm}
    for i in range(len(model.model.layers)):
        wanted |= {f"model.layers.{i}.{name}".rstrip("."): kind for name, kind in _LAYER.items()}
    refused = _refusals(model, family, wanted)
    if refused and strict:
        raise ValueError(f"patch: every piece must agree with its module, got {_summary(refused)}")
    pieces = {}
    for name, kind in wanted.items():
        if name not in refused:
            try:
                pieces[name] = _bound(kind, model.get_submodule(name), family, model.config)
            except Exception as error:  # of whatever the module is made of
                refused[name] = _reason(error)
    for piece in pieces.values():
        piece.install()
    report = PatchReport(Counter(type(piece).__name__ for piece in pieces.values()), refused)
    if report.replaced["Attention"]:
        model.set_attn_implementation(NAME)
    decoder = _decoder(model, family, pieces)
    if refused and (
        decoder is None or {kind.__name__ for kind in wanted.values()} - set(report.replaced)
    ):
        warnings.warn(
            f"patch: {len(refused)} of {len(wanted)} modules of this {type(model).__name__} stay "
            f"as they were: {_summary(refused)}",
            stacklevel=3,
        )
    model._llamatelemetry = _Patched(report, pieces, decoder, attn_implementation)
    return report


def _refusals(model: Any, family: Family, wanted: Mapping[str, type[Piece]]) -> dict[str, str]:
    """Why modules may not be replaced; one of each likeness is tried, and is as it was after."""
    verdicts: dict[object, str | None] = {}
    refused = {}
    for name, kind in wanted.items():
        try:
            module = model.get_submodule(name)
            key = likeness(kind, module)
            if key not in verdicts:
                verdicts[key] = _verdict(kind, module, family, model)
            reason = verdicts[key]
        except Exception as error:
            reason = _reason(error)
        if reason is not None:
            refused[name] = reason
    return refused


def _verdict(kind: type[Piece], module: nn.Module, family: Family, model: Any) -> str | None:
    """Why kind may not stand for module, which is as it was afterwards; None if it may."""
    tensors = TensorsOf(module)
    try:
        piece = kind(module, family, model.config)
        return disagreement(piece, model.model.rotary_emb, model.model.norm.weight)
    except Exception as error:  # of whatever the module is made of
        return _reason(error)
    finally:
        tensors.restore()


def _bound(kind: type[Piece], module: nn.Module, family: Family, config: Any) -> Piece:
    """The piece, or the module as it was and what went wrong."""
    tensors = TensorsOf(module)
    try:
        return kind(module, family, config)
    except Exception:
        tensors.restore()
        raise


def _reason(error: Exception) -> str:
    expected = isinstance(error, (AttributeError, RuntimeError, ValueError)) and str(error)
    return str(error) if expected else f"{type(error).__name__}: {error}"


def _summary(refused: Mapping[str, str]) -> str:
    """Each reason once, with the first module that it is of."""
    first: dict[str, str] = {}
    for name, reason in refused.items():
        first.setdefault(reason, name)
    return "; ".join(f"{name}: {reason}" for reason, name in first.items())


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
