"""Which pieces a model is to have, and why it may not have some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from llamatelemetry.models.hf_overrides import in_force
from llamatelemetry.models.opset import OpSet
from llamatelemetry.models.pieces.attention import Attention
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.layer import DecoderLayer, norm_in
from llamatelemetry.models.pieces.linear import is_dense
from llamatelemetry.models.pieces.merge import TensorsOf, in_more_bits, plain_tensors
from llamatelemetry.models.pieces.mlp import MLPS
from llamatelemetry.models.pieces.norm import norm_piece
from llamatelemetry.models.pieces.watch import has_hooks
from llamatelemetry.models.probe import disagreement, likeness
from llamatelemetry.models.probe_setting import undisturbed
from llamatelemetry.models.spec import LayerSpec, unread_field
from llamatelemetry.models.stack import Stack
from llamatelemetry.quantization.w8a8 import W8A8Linear


def wanted_pieces(stack: Stack) -> dict[str, type[Piece]]:
    """What is to stand for which module."""
    spec, norm = stack.spec, norm_piece(stack.spec)
    wanted: dict[str, type[Piece]] = {}
    if stack.norm is not None:
        wanted[stack.named(stack.family.parts.norm)] = norm
    for i, layer in enumerate(stack.layers):
        kinds: dict[str, type[Piece]] = {
            name: norm for name in spec.norms if norm_in(layer, name) is not None
        }
        if spec.attention_kind == "projected":
            kinds[spec.attention] = Attention
        if spec.mlp_kind in MLPS:
            kinds[spec.mlp] = MLPS[spec.mlp_kind]
        wanted |= {stack.layer_name(i, name): kind for name, kind in kinds.items()}
        wanted[stack.layer_name(i)] = DecoderLayer
    return wanted


def refuse_what_triton_lacks(model: Any, stack: Stack) -> None:
    """Refuses a model whose layers would run in part on other kernels.

    Raises:
        ValueError: What it is, and what the ops in Triton serve.
    """
    from llamatelemetry.triton_ops.launch import why_not_on

    if (reason := why_not_on(stack.like().device)) is not None:
        raise ValueError(f"backend triton: {reason}")
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    if (head := get_head()) is not None and not is_dense(head):
        raise ValueError(
            "backend triton: the vocabulary projection must be torch's Linear, got "
            f"{type(head).__name__}"
        )
    kinds = (stack.spec.attention_kind, stack.spec.mlp_kind)
    if kinds != ("projected", "gated"):
        raise ValueError(
            "backend triton serves layers of projected attention and a gated MLP, got "
            f"{kinds[0]} attention and a {kinds[1]} MLP"
        )


def refusals(
    model: Any, stack: Stack, ops: OpSet, wanted: Mapping[str, type[Piece]]
) -> dict[str, str]:
    """Why modules may not be replaced; one of each likeness is tried, and is as it was after."""
    if ops.name == "triton":
        refuse_what_triton_lacks(model, stack)
    whole = unread_field(stack.spec, stack.config)
    if whole is not None:
        return dict.fromkeys(wanted, whole)
    verdicts: dict[object, str | None] = {}
    refused = {}
    for name, kind in wanted.items():
        try:
            module = model.get_submodule(name)
            _refuse_strangers(module)
            for changed in filter(None, map(in_force, module.modules())):
                raise ValueError(f"the module must be without {changed}; disable_flash_attention")
            i = stack.layer_of(name)
            key = (likeness(kind, module), stack.rope_kind(i))
            if key not in verdicts:
                verdicts[key] = _verdict(kind, module, stack, i, ops)
            reason = verdicts[key]
        except Exception as error:
            reason = reason_of(error)
        if reason is not None:
            refused[name] = reason
    return refused


def _refuse_strangers(module: nn.Module) -> None:
    """What quantised a model as transformers loaded it has kernels of its own."""
    for name, part in module.named_modules():
        if type(part).__module__.partition(".")[0] == "bitsandbytes":
            raise ValueError(
                f"{name} is bitsandbytes' {type(part).__name__}, which patch does not serve; "
                "load_model reads bitsandbytes' directories"
            )


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
        with undisturbed(module):
            if any(isinstance(part, W8A8Linear) for part in module.modules()):
                # Roundings of activations to a byte would hide an error, so a copy with dense
                # linears is held to it first.
                with plain_tensors():
                    dense = in_more_bits(module, stack.like().dtype, piece.config)
                twin = kind(dense, stack.spec, stack.config, ops)
                reason = disagreement(twin, stack.angles(layer), stack.like())
                if reason is not None:
                    return reason
            return disagreement(piece, stack.angles(layer), stack.like())
    except Exception as error:  # of whatever the module is made of
        return reason_of(error)
    finally:
        tensors.restore()


def bind(kind: type[Piece], module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet) -> Piece:
    """The piece, or the module as it was and what went wrong."""
    tensors = TensorsOf(module)
    try:
        return kind(module, spec, config, ops)
    except Exception:
        tensors.restore()
        raise


def reason_of(error: Exception) -> str:
    expected = isinstance(error, (AttributeError, RuntimeError, ValueError)) and str(error)
    return str(error) if expected else f"{type(error).__name__}: {error}"


def summary(refused: Mapping[str, str]) -> str:
    """Each reason once, with the first module that it is of."""
    first: dict[str, str] = {}
    for name, reason in refused.items():
        first.setdefault(reason, name)
    return "; ".join(f"{name}: {reason}" for reason, name in first.items())
