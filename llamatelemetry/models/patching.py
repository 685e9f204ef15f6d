"""Putting our pieces in the place of a transformers model's modules, and out again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.models.decoder import Decoder, rope_tables
from llamatelemetry.models.families import FAMILIES
from llamatelemetry.models.guess import find_stack
from llamatelemetry.models.hf_attention import choose_ours, leave, register
from llamatelemetry.models.hf_overrides import in_force
from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.pieces.attention import Attention
from llamatelemetry.models.pieces.base import Piece, has_hooks
from llamatelemetry.models.pieces.layer import DecoderLayer
from llamatelemetry.models.pieces.merge import TensorsOf
from llamatelemetry.models.pieces.mlp import GatedMlp
from llamatelemetry.models.pieces.norm import norm_piece
from llamatelemetry.models.probe import disagreement, likeness
from llamatelemetry.models.spec import LayerSpec, unread_field
from llamatelemetry.models.stack import Stack
from llamatelemetry.models.step_input import DecoderState, StepInput
from llamatelemetry.models.whole import WholeProbe, evaluating, whole_decoder

__all__ = [
    "FAMILIES",
    "PatchReport",
    "forward_tokens",
    "patch",
    "rope_tables",
    "unpatch",
    "why_not_packed",
]


_USER = "patch"  # of our attention


@dataclass
class PatchReport:
    """What patch replaced, and what it did not.

    Attributes:
        replaced: how often each piece stands for a module
        refused: module name -> why it stays as it was
        not_packed: why the engine cannot run the model although every piece that it needs stands;
            None if it can, or if refused says why

    Example:
        >>> PatchReport().refused
        {}
    """

    replaced: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)
    not_packed: str | None = None


@dataclass
class _Patched:
    stack: Stack
    report: PatchReport
    pieces: dict[str, Piece]
    decoder: Decoder | None
    ops: OpSet


@torch.no_grad()
def patch(model: Any, strict: bool = False, ops: OpSet = NATIVE) -> PatchReport:
    """Puts our ops in the place of a transformers model's modules, in place; weights are shared.

    Each replacement first has to give what its module gives on random input; one that does not,
    stays out, is named in the report and, where it costs the packed forward or a whole kind of
    piece, in a warning. Layers that differ in their weights alone are tried once. While gradients
    are enabled a replacement hands over to the module's own forward, so call the model under
    torch.no_grad() or torch.inference_mode(), as generate does.

    Once a parameter or a part of a replaced module is another one, or carries a forward hook, the
    module's own forward runs again, and forward_tokens raises: unpatch and patch again. Steps that
    the engine has recorded, and tensors put into a parameter's data, are not looked at.

    Args:
        model: an instance of a class in FAMILIES, of a subclass, or whatever has the base model of
            one inside; plain or with quantised linears.
        strict: whether a refused piece is an error, raised before any forward is replaced and, if
            the probe refused it, before a tensor has moved.
        ops: what the pieces compute with.

    Returns:
        The report; a second call changes nothing and returns it again.

    Raises:
        ValueError: a model of another class, or one that is patched with other ops; with strict, a
            piece that is refused, in a second call too.

    Example:
        >>> sorted(patch(model).replaced)
        ['Attention', 'DecoderLayer', 'GatedMlp', 'RmsNorm']
    """
    if (patched := model.__dict__.get("_llamatelemetry")) is not None:
        return _again(patched, strict, ops)
    register()
    stack = find_stack(model, lambda stack: _refusals(model, stack, ops, _wanted(stack)))
    whole = None if stack.is_base() and stack.is_row(model) else WholeProbe(stack)
    wanted = _wanted(stack)
    refused = _refusals(model, stack, ops, wanted)
    pieces = {}
    for name, kind in wanted.items():
        if name not in refused and not (refused and strict):
            try:
                module = model.get_submodule(name)
                pieces[name] = _bound(kind, module, stack.spec, stack.config, ops)
            except Exception as error:  # of whatever the module is made of
                refused[name] = _reason(error)
    if refused and strict:
        for piece in pieces.values():
            piece.unbind()
        raise _disagree(refused)
    for piece in pieces.values():
        piece.install()
    report = PatchReport(Counter(type(piece).__name__ for piece in pieces.values()), refused)
    has_attention = report.replaced["Attention"] or stack.spec.attention_kind == "own"
    if pieces and has_attention and ops.attn_implementation is not None:
        choose_ours(model, _USER)
    if whole is not None and (reason := whole.disagreement()) is not None:
        _take_out(model, pieces)
        pieces, refused = {}, dict.fromkeys(wanted, reason)
        report = PatchReport(Counter(), refused)
        if strict:
            raise _disagree(refused)
    decoder = None
    if all(name in pieces for name, kind in wanted.items() if kind is not GatedMlp):
        decoder, report.not_packed = whole_decoder(model, stack, ops, pieces, whole)
    if decoder is not None and (reason := decoder.why_not()) is not None:
        decoder, report.not_packed = None, reason
        warnings.warn(f"patch: the engine cannot run this model: {reason}", stacklevel=3)
    if refused and (
        (decoder is None and report.not_packed is None)
        or {kind.__name__ for kind in wanted.values()} - set(report.replaced)
    ):
        warnings.warn(
            f"patch: {len(refused)} of {len(wanted)} modules of this {type(model).__name__} stay "
            f"as they were: {_summary(refused)}",
            stacklevel=3,
        )
    model._llamatelemetry = _Patched(stack, report, pieces, decoder, ops)
    return report


def _disagree(refused: Mapping[str, str]) -> ValueError:
    return ValueError(f"patch: every piece must agree with its module, got {_summary(refused)}")


def _again(patched: _Patched, strict: bool, ops: OpSet) -> PatchReport:
    """What patch gives for a model that is patched."""
    if ops != patched.ops:
        raise ValueError(
            "patch: ops must be those that the model is patched with, got others; call "
            "unpatch(model) first"
        )
    if strict and patched.report.refused:
        raise _disagree(patched.report.refused)
    return patched.report


def _wanted(stack: Stack) -> dict[str, type[Piece]]:
    """What is to stand for which module."""
    spec, norm = stack.spec, norm_piece(stack.spec)
    wanted: dict[str, type[Piece]] = {}
    if stack.norm is not None:
        wanted[stack.named(stack.family.parts.norm)] = norm
    for i, layer in enumerate(stack.layers):
        kinds: dict[str, type[Piece]] = {
            name: norm for name in spec.norms if getattr(layer, name, None) is not None
        }
        if spec.attention_kind == "projected":
            kinds[spec.attention] = Attention
        if spec.mlp_kind == "gated":
            kinds[spec.mlp] = GatedMlp
        wanted |= {stack.layer_name(i, name): kind for name, kind in kinds.items()}
        wanted[stack.layer_name(i)] = DecoderLayer
    return wanted


def _refusals(
    model: Any, stack: Stack, ops: OpSet, wanted: Mapping[str, type[Piece]]
) -> dict[str, str]:
    """Why modules may not be replaced; one of each likeness is tried, and is as it was after."""
    whole = unread_field(stack.spec, stack.config)
    if whole is not None:
        return dict.fromkeys(wanted, whole)
    verdicts: dict[object, str | None] = {}
    refused = {}
    for name, kind in wanted.items():
        try:
            module = model.get_submodule(name)
            for changed in filter(None, map(in_force, module.modules())):
                raise ValueError(f"the module must be without {changed}; disable_flash_attention")
            i = stack.layer_of(name)
            key = (likeness(kind, module), stack.rope_kind(i))
            if key not in verdicts:
                verdicts[key] = _verdict(kind, module, stack, i, ops)
            reason = verdicts[key]
        except Exception as error:
            reason = _reason(error)
        if reason is not None:
            refused[name] = reason
    return refused


def _verdict(
    kind: type[Piece], module: nn.Module, stack: Stack, layer: int, ops: OpSet
) -> str | None:
    """Why kind may not stand for module, which is as it was afterwards; None if it may."""
    tensors = TensorsOf(module)
    try:
        piece = kind(module, stack.spec, stack.config, ops)
        for name, part in piece.bypassed():
            if has_hooks(part._forward_hooks, part._forward_pre_hooks):
                return f"{name} carries forward hooks, which the replacement would not run"
        with evaluating(module):
            return disagreement(piece, stack.angles(layer), stack.like())
    except Exception as error:  # of whatever the module is made of
        return _reason(error)
    finally:
        tensors.restore()


def _bound(kind: type[Piece], module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet) -> Piece:
    """The piece, or the module as it was and what went wrong."""
    tensors = TensorsOf(module)
    try:
        return kind(module, spec, config, ops)
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
    """Undoes patch; a model that is not patched stays as it is.

    Example:
        >>> report = patch(model)
        >>> unpatch(model)
    """
    patched: _Patched | None = model.__dict__.pop("_llamatelemetry", None)
    if patched is not None:
        _take_out(model, patched.pieces)


def _take_out(model: Any, pieces: Mapping[str, Piece]) -> None:
    for piece in pieces.values():
        piece.remove()
    leave(model, _USER)


def why_not_packed(model: Any) -> str | None:
    """Why forward_tokens would refuse the model as it is now; None if it would not."""
    patched: _Patched | None = model.__dict__.get("_llamatelemetry")
    if patched is None:
        return "it is not patched"
    if patched.decoder is None:
        return patched.report.not_packed or str(patched.report.refused)
    return patched.decoder.why_not()


@torch.no_grad()
def forward_tokens(model: Any, input_ids: Tensor, step: StepInput, state: DecoderState) -> Tensor:
    """Logits [batch, vocab_size] of the last token of each sequence; appends to the paged cache."""
    patched: _Patched | None = model.__dict__.get("_llamatelemetry")
    if patched is None or patched.decoder is None:
        reason = why_not_packed(model)
        raise ValueError(f"forward_tokens: model must be patched as a whole, got {reason}")
    if (reason := patched.decoder.why_not()) is not None:
        raise RuntimeError(f"forward_tokens: {reason}; call unpatch(model) and patch(model) again")
    return patched.decoder.forward(input_ids, step, state)
