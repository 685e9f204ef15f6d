"""Putting our pieces in the place of a transformers model's modules, and out again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.models.decoder import Decoder, rope_state, rope_tables
from llamatelemetry.models.families import FAMILIES
from llamatelemetry.models.forked import note_step
from llamatelemetry.models.guess import find_stack
from llamatelemetry.models.hf_attention import choose_ours, leave, register
from llamatelemetry.models.opset import NATIVE, OpSet, backend_of, opset_of
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.mlp import MLPS
from llamatelemetry.models.refusals import bind, reason_of, refusals, summary, wanted_pieces
from llamatelemetry.models.report import PatchReport
from llamatelemetry.models.stack import Stack
from llamatelemetry.models.step_input import DecoderState, StepInput
from llamatelemetry.models.whole import WholeProbe, whole_decoder
from llamatelemetry.quantization.modules import QuantEmbedding

__all__ = [
    "FAMILIES",
    "PatchReport",
    "bindings",
    "embedding_of",
    "forward_tokens",
    "ops_of",
    "patch",
    "rope_state",
    "rope_tables",
    "unpatch",
    "why_not_forward_tokens",
]

_USER = "patch"  # of our attention


@dataclass
class _Patched:
    stack: Stack
    report: PatchReport
    pieces: dict[str, Piece]
    decoder: Decoder | None
    ops: OpSet

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, whose decoder is made of its own modules when it is first asked for."""
        return self.__dict__ | {"decoder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register()  # a process that has loaded a pickle may not know our attention yet


@torch.no_grad()
def patch(
    model: Any, strict: bool = False, ops: OpSet | None = None, *, backend: str | None = None
) -> PatchReport:
    """Puts our ops in the place of a transformers model's modules, in place; weights are shared.

    Each replacement first has to give what its module gives on random input; one that does not,
    stays out, is named in the report and, where it costs the packed forward or a whole kind of
    piece, in a warning. Layers that differ in their weights alone are tried once. Where
    the input or a weight requires gradients, call the model under torch.no_grad().

    On every call a replacement looks whether its module's parts are those that it is bound to,
    without hooks, and their weights where it reads them. Where they are not, and under gradients,
    autocast to another dtype, vmap or dropout, the module's own forward runs, hooks and all. New
    weights of the same kind are taken up once they have stood for two calls; what cannot be
    followed is said once in a warning and stands in the report. Copies and pickles of the model
    are patched models of their own; loading one needs this package.

    Where the model gets a packed forward, Linux is asked to put its weights on the CPU in huge
    pages, at the same addresses: since Linux 6.1 patch waits until they are copied there, in time
    proportional to their size; before, the kernel does it later or never.

    Args:
        model: an instance of a class in FAMILIES, of a subclass, or whatever has the base model of
            one inside; plain or with quantised linears.
        strict: whether a refused piece is an error, raised before any forward is replaced and, if
            the probe refused it, before a tensor has moved.
        ops: what the pieces compute with; None is what backend names.
        backend: "native", our C++ and CUDA; or "triton", Triton's kernels for the packed forward.
            None is native; on a GPU that this build has no kernels for triton, said in a warning.

    Returns:
        The report; a second call changes nothing and returns it again.

    Raises:
        ValueError: a model of another class, or one that is patched with other ops; with strict, a
            piece that is refused, in a second call too; a backend that cannot run it.
        RuntimeError: in a forked process whose parent's threads it would wait for.

    Example:
        >>> sorted(patch(model).replaced)
        ['Attention', 'DecoderLayer', 'GatedMlp', 'RmsNorm']
    """
    _check_is_module(model)
    ops = opset_of(backend or backend_of(model)) if ops is None else ops
    if (patched := model.__dict__.get("_llamatelemetry")) is not None:
        return _again(patched, strict, ops)
    note_step()
    register()
    _remove_strangers(model)
    stack = find_stack(model, lambda stack: refusals(model, stack, ops, wanted_pieces(stack)))
    whole = None if stack.is_known_in(model) else WholeProbe(stack)
    refused = refusals(model, stack, ops, wanted := wanted_pieces(stack))
    pieces = _made(model, stack, ops, wanted, refused, strict)
    report = PatchReport(Counter(type(piece).__name__ for piece in pieces.values()), refused)
    for name, piece in pieces.items():
        piece.install(name, report)
    has_attention = report.replaced["Attention"] or stack.spec.attention_kind == "own"
    if pieces and has_attention and ops.attn_implementation is not None:
        choose_ours(model, _USER)
    if whole is not None and (reason := whole.disagreement()) is not None:
        _take_out(model, pieces)
        pieces, refused = {}, dict.fromkeys(wanted, reason)
        report = PatchReport(Counter(), refused)
        if strict:
            raise _disagree(refused)
    decoder, report.not_packed = _packed(model, stack, ops, pieces, whole)
    if decoder is not None and (reason := decoder.why_not()) is not None:
        decoder, report.not_packed = None, reason
        warnings.warn(f"patch: the engine cannot run this model: {reason}", stacklevel=3)
    if refused and (
        (decoder is None and report.not_packed is None)
        or {kind.__name__ for kind in wanted.values()} - set(report.replaced)
    ):
        warnings.warn(
            f"patch: {len(refused)} of {len(wanted)} modules of this {type(model).__name__} stay "
            f"as they were: {summary(refused)}",
            stacklevel=3,
        )
    model._llamatelemetry = _Patched(stack, report, pieces, decoder, ops)
    return report


def _made(
    model: Any,
    stack: Stack,
    ops: OpSet,
    wanted: Mapping[str, type[Piece]],
    refused: dict[str, str],
    strict: bool,
) -> dict[str, Piece]:
    """The pieces that are not refused, bound to their modules; refused gets those that fail."""
    pieces: dict[str, Piece] = {}
    for name, kind in wanted.items():
        if name not in refused and not (refused and strict):
            try:
                module = model.get_submodule(name)
                pieces[name] = bind(kind, module, stack.spec, stack.config, ops)
            except Exception as error:  # of whatever the module is made of
                refused[name] = reason_of(error)
    if refused and strict:
        for piece in pieces.values():
            piece.unbind()
        raise _disagree(refused)
    return pieces


def _check_is_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch: model must be a transformers model, got {type(model).__name__}")


def _remove_strangers(model: nn.Module) -> None:
    """Takes out pieces that came with modules of other patched models, or copies of them."""
    for module in model.modules():
        piece = getattr(vars(module).get("forward"), "__self__", None)
        if isinstance(piece, Piece):
            piece.remove()


def _disagree(refused: Mapping[str, str]) -> ValueError:
    return ValueError(f"patch: every piece must agree with its module, got {summary(refused)}")


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


def ops_of(model: Any) -> OpSet:
    """What a model is patched with; NATIVE where it is not."""
    patched: _Patched | None = model.__dict__.get("_llamatelemetry")
    return NATIVE if patched is None else patched.ops


def bindings(model: Any) -> list[object]:
    """One object for each piece of a model, another one once the piece was bound anew."""
    patched: _Patched | None = model.__dict__.get("_llamatelemetry")
    return [] if patched is None else [piece._watch for piece in patched.pieces.values()]


def why_not_forward_tokens(model: Any, renew: bool = False) -> str | None:
    """Why forward_tokens would not be the model as it is now; None if it would be.

    Args:
        renew: whether the packed forward may be made again where modules or weights were replaced;
            steps that were captured or recorded before read the old ones.
    """
    return _current_decoder(model, renew)[1]


@torch.no_grad()
def forward_tokens(model: Any, input_ids: Tensor, step: StepInput, state: DecoderState) -> Tensor:
    """Logits [batch, vocab_size] of the last token of each sequence; appends to the paged cache."""
    decoder, reason = _current_decoder(model, renew=True)
    if decoder is None:
        raise ValueError(f"forward_tokens: model must be patched as a whole, got {reason}")
    if reason is not None:
        what = "remove them" if "forward hooks" in reason else "undo it"
        advice = f"{what}, or begin again: a new generation runs the model's own forward"
        raise RuntimeError(f"forward_tokens: {reason}; {advice}")
    return decoder.forward(input_ids, step, state)


def embedding_of(model: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What makes StepInput.embedded of ids and positions, for a forward that is recorded; None
    where the recording can hold the look-up, or there is no packed forward."""
    decoder, _ = _current_decoder(model, renew=True)
    if decoder is None or isinstance(decoder.stack.embedding, QuantEmbedding):
        return None
    return torch.no_grad()(decoder.embed)


def _current_decoder(model: Any, renew: bool) -> tuple[Decoder | None, str | None]:
    """The packed forward of a patched model, and why it is not the model's as it is now."""
    patched: _Patched | None = model.__dict__.get("_llamatelemetry")
    if patched is None:
        return None, "it is not patched"
    report = patched.report
    if patched.decoder is None and report.not_packed is None:
        patched.decoder, _ = _packed(model, patched.stack, patched.ops, patched.pieces, None)
    if (old := patched.decoder) is None:
        return None, report.not_packed or str(report.refused)
    if (reason := old.why_not()) is None or not renew or not old.is_replaced():
        return old, reason
    patched = _patched_anew(model, patched)
    if patched.decoder is None:
        return old, report.not_packed or summary(report.refused)
    return patched.decoder, patched.decoder.why_not()


def _patched_anew(model: Any, patched: _Patched) -> _Patched:
    """The model is patched as it is now; its report stays the object that it was."""
    report = patched.report
    unpatch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        report.become(patch(model, ops=patched.ops))
    renewed: Any = model._llamatelemetry
    renewed.report = report
    for piece in renewed.pieces.values():
        piece.report = report
    return renewed


def _packed(
    model: Any, stack: Stack, ops: OpSet, pieces: Mapping[str, Piece], whole: WholeProbe | None
) -> tuple[Decoder | None, str | None]:
    """The packed forward, where all that it fuses is replaced, or why the model has none."""
    needed = (name for name, kind in wanted_pieces(stack).items() if kind not in MLPS.values())
    if not all(name in pieces for name in needed):
        return None, None
    return whole_decoder(model, stack, ops, pieces, whole)
