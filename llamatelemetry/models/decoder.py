"""A patched model over packed tokens: what the engine runs, records and captures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamatelemetry.models.hf_overrides import in_force
from llamatelemetry.models.opset import OpSet
from llamatelemetry.models.pieces.angles import rope_angles
from llamatelemetry.models.pieces.attention import Attention
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.layer import DecoderLayer, add_norm, norm_of, number_of
from llamatelemetry.models.pieces.linear import head_of
from llamatelemetry.models.pieces.mlp import GatedMlp, UngatedMlp
from llamatelemetry.models.pieces.norm import NormFunction
from llamatelemetry.models.pieces.watch import has_hooks
from llamatelemetry.models.stack import Stack, stack_of
from llamatelemetry.models.step_input import DecoderState, StepInput
from llamatelemetry.quantization.rows import RowFormat


@dataclass
class Block:
    """One decoder layer: its pieces, and the norm that follows it."""

    layer: DecoderLayer
    attention: Attention
    mlp: Callable[[Any], Tensor]
    next_norm: NormFunction | None  # the next layer's first, or the model's last
    rope: int | None  # which of the tables of rotary embeddings
    gate: GatedMlp | UngatedMlp | None  # the MLP's piece; None where the layer's module is called

    def takes(self) -> tuple[RowFormat | None, RowFormat | None]:
        """How attention and MLP take quantised rows; a parallel MLP is given the attention's."""
        mlp = None if self.gate is None else self.gate.into.takes
        return None if self.layer.is_parallel else self.attention.takes, mlp


class Decoder:
    """Embedding, blocks, final norm and vocabulary projection of a patched model."""

    def __init__(
        self,
        model: Any,
        stack: Stack,
        ops: OpSet,
        blocks: Sequence[Block],
        pieces: Mapping[str, Piece],
    ) -> None:
        spec, parts = stack.spec, stack.family.parts
        self.model, self.stack, self.pieces = model, stack, pieces
        self._bound = _path(model, stack.path)
        self._bound += [
            (stack.module._modules, name, getattr(stack.module, name))
            for name in (parts.layers, parts.norm)
        ]
        if stack.rotary is not None:
            self._bound.append((stack.module._modules, parts.rotary, stack.rotary))
        self._bound += [(stack.layers._modules, *item) for item in stack.layers._modules.items()]
        self._bound += [
            (layer._modules, name, getattr(layer, name, None))
            for layer in stack.layers
            for name in (*spec.norms, spec.attention)
        ]
        called = [stack.embedding, model.get_output_embeddings(), stack.rotary]
        for i, layer in enumerate(stack.layers):
            if spec.mlp_kind == "plain":
                called += [getattr(layer, name) for name in (*spec.gate_up, spec.down)]
            elif stack.layer_name(i, spec.mlp) not in pieces:
                called.append(getattr(layer, spec.mlp))
        inside = {part for module in called if module is not None for part in module.modules()}
        self._left_out = [
            (part._forward_hooks, part._forward_pre_hooks, name)
            for name, part in model.named_modules()
            if part not in inside
        ]
        self._made_of = self._follows()
        self.ops, self.blocks = ops, list(blocks)
        self.first_norm = norm_of(stack.layers[0], spec.first_norm, spec, ops)

    def _follows(self) -> int:
        return sum(piece.follows for piece in self.pieces.values())

    def is_replaced(self) -> bool:
        """Whether modules or weights are others than those that it is made of."""
        return (
            any(entries.get(key) is not module for entries, key, module in self._bound)
            or any(piece.is_replaced() for piece in self.pieces.values())
            or self._follows() != self._made_of
        )

    def why_not(self) -> str | None:
        """What of the model as it is now the packed forward would leave out; None if nothing."""
        for before, after, name in self._left_out:
            if (before or after) and has_hooks(before, after):
                return f"{name or 'the model'} carries forward hooks, which the engine does not run"
        for entries, key, module in self._bound:
            if entries.get(key) is not module:
                return f"{key} of the model's modules has been replaced since patch"
        if (reason := _no_table(self.stack)) is not None:
            return reason
        for name, piece in self.pieces.items():
            if (part := piece.changed()) is not None:
                return f"{name}: {part}"
        if self._follows() != self._made_of:
            # A step that was captured or recorded meanwhile reads the old ones.
            return "weights of the model's modules have been replaced since patch"
        for block in self.blocks:
            if getattr(block.attention.module, "is_causal", True) is False:
                return "its attention must be causal, got is_causal = False"
            if (changed := in_force(block.attention.module)) is not None:
                return f"the engine does not know of {changed}: disable_flash_attention undoes it"
        return None

    def forward(self, input_ids: Tensor, step: StepInput, state: DecoderState) -> Tensor:
        """Logits [batch, vocab_size] of the last token of each sequence, or of those kept."""
        last, norm = self.blocks[-1], self.first_norm
        given = step.embedded
        residual = self.embed(input_ids, step.positions) if given is None else given
        takes = [block.takes() for block in self.blocks] + [(None, None)]
        x: Any = residual if norm is None else norm.rows(residual, takes[0][0])
        for i, (block, cache) in enumerate(zip(self.blocks, state.caches, strict=True)):
            attend = partial(
                block.attention.step,
                step=step,
                rope=None if block.rope is None else state.rope[block.rope],
                cache=cache,
            )
            x = block.layer.run(x, residual, attend, block.mlp, takes[i][1])
            cut = step.kept is not None or (step.max_seqlen_q > 1 and not step.keeps_all)
            if block is last and cut:
                ends = step.cu_seqlens_q[1:] - 1 if step.kept is None else step.kept
                x, residual = x[ends], residual[ends]
            x = add_norm(x, residual, block.next_norm, takes[i + 1][0])
        return self._scaled(head_of(self.model.get_output_embeddings(), self.ops)(x))

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """What the first layer takes, [num_tokens, hidden_size]."""
        x = self.stack.embedding(input_ids)
        multiplier = number_of(self.stack.module, self.stack.spec.embedding_multiplier)
        if multiplier != 1.0:
            x = x * multiplier
        if (table := self.stack.positions) is not None:
            offset = getattr(table, "offset", 0)  # OPT keeps two rows for padding
            x = x + nn.functional.embedding(positions + offset, table.weight)
        return x

    def _scaled(self, logits: Tensor) -> Tensor:
        spec = self.stack.spec
        if (scaling := self._number(spec.logits_scaling)) != 1.0:
            logits = logits / scaling
        if (scale := self._number(spec.logit_scale)) != 1.0:
            logits = logits * scale
        softcap = getattr(self.stack.config, spec.final_softcap) if spec.final_softcap else None
        if softcap:
            logits = (logits / softcap).tanh() * softcap
        return logits

    def _number(self, name: str) -> float:
        """As it is now: some families read it from the config, some took it from there once."""
        return number_of(self.model if name in vars(self.model) else self.stack.config, name)


def decoder_of(
    model: Any, stack: Stack, ops: OpSet, pieces: Mapping[str, Piece]
) -> tuple[Decoder | None, str | None]:
    """The packed forward of a model whose layers are replaced, or why it has none.

    An MLP may be any module.
    """
    if stack.spec.attention_kind == "own":
        return None, f"the attention of {type(model).__name__} stays transformers' own"
    if (reason := _not_causal(model, stack) or _no_table(stack)) is not None:
        return None, reason
    spec = stack.spec
    norms = [norm_of(layer, spec.first_norm, spec, ops) for layer in stack.layers[1:]]
    norms.append(None if stack.norm is None else NormFunction(stack.norm, spec.norm, ops))
    kinds, blocks = stack.rope_kinds(), []
    for i, norm in enumerate(norms):
        layer, attention = (pieces[stack.layer_name(i, name)] for name in ("", spec.attention))
        assert isinstance(layer, DecoderLayer)
        assert isinstance(attention, Attention)
        mlp = pieces.get(stack.layer_name(i, spec.mlp)) if spec.mlp else None
        gate = mlp if isinstance(mlp, (GatedMlp, UngatedMlp)) else None
        step = _as_batch(layer.mlp) if gate is None else gate.step
        rope = kinds.index(stack.rope_kind(i)) if kinds else None
        blocks.append(Block(layer, attention, step, norm, rope, gate))
    return Decoder(model, stack, ops, blocks, pieces), None


def _not_causal(model: Any, stack: Stack) -> str | None:
    """Why a model is no decoder with a vocabulary projection and nothing else; None if it is."""
    get_head = getattr(model, "get_output_embeddings", None)
    has_head = get_head is not None and get_head() is not None
    # Of a model around it, a multimodal one say, the whole probe has to agree on text alone.
    if not has_head or not (isinstance(model, PreTrainedModel) or stack.is_bare_in(model)):
        return f"{type(model).__name__} is not decoder layers and a vocabulary projection alone"
    return None


def _no_table(stack: Stack) -> str | None:
    """Why no table can stand for a stack's rotary embedding; None if one may."""
    rotary = stack.rotary
    if rotary is None or (isinstance(rotary, nn.Module) and "forward" not in vars(rotary)):
        return None
    what = "a forward of its own" if isinstance(rotary, nn.Module) else type(rotary).__name__
    return f"its rotary embedding must be a module of transformers, got {what}"


def _as_batch(mlp: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An MLP of transformers over packed tokens: it may count on a batch's three dimensions."""
    return lambda x: mlp(x.unsqueeze(0)).squeeze(0)


def _path(model: nn.Module, path: str) -> list[tuple[dict[str, Any], str, Any]]:
    """(the modules of one, a name, the module there) for each step of a path."""
    steps: list[tuple[dict[str, Any], str, Any]] = []
    for name in filter(None, path.split(".")):
        steps.append((model._modules, name, getattr(model, name)))
        model = getattr(model, name)
    return steps


def rope_tables(
    model: Any, num_positions: int, stack: Stack | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Tables of each kind of rotary embedding that the model's layers use, from its own module.

    Args:
        stack: the model's, where it is known already.

    Returns:
        cos and sin [num_positions or more, rotary_dim] each, in the order of Stack.rope_kinds.

    Raises:
        ValueError: a rotary embedding whose table changes with the sequence length.
    """
    if stack is None:
        patched = model.__dict__.get("_llamatelemetry")
        stack = stack_of(model) if patched is None else patched.stack
    kinds = stack.rope_kinds()
    for kind in kinds:
        _check_length(stack, kind, num_positions)
    like = stack.like()
    positions = torch.arange(max(num_positions, 1), device=like.device).unsqueeze(0)
    tables = []
    for kind in kinds:
        cos, sin = rope_angles(stack.spec, *stack.turned(like, positions, kind))
        tables.append((cos[0].to(like.dtype), sin[0].to(like.dtype)))
    return tables


def rope_state(model: Any) -> list[object]:
    """What the tables are made of, to be compared: the module, its pointers, versions, numbers."""
    patched = model.__dict__.get("_llamatelemetry")
    rotary = None if patched is None else patched.stack.rotary
    if not isinstance(rotary, nn.Module):  # none, or what someone has put there
        return [rotary]
    tensors = [
        (name, x.data_ptr(), None if x.is_inference() else x._version)
        for part in rotary.modules()
        for name, x in (*part._parameters.items(), *part._buffers.items())
        if x is not None
    ]
    numbers = [x for x in vars(rotary).items() if isinstance(x[1], (int, float, str, dict))]
    return [
        rotary,
        type(rotary).forward,
        vars(rotary).get("forward"),
        *rotary._forward_hooks.values(),
        *rotary._forward_pre_hooks.values(),
        *tensors,
        *((name, value) for name, value in numbers if name[0] != "_" and name != "training"),
    ]


def _check_length(stack: Stack, kind: str | None, num_positions: int) -> None:
    parameters = getattr(stack.config, "rope_parameters", None)
    rope_type = getattr(stack.rotary, "rope_type", None)
    if parameters is None or rope_type is None:
        raise ValueError(
            "rotary embeddings must be a module of transformers, of which there is a table, got "
            f"{getattr(stack.rotary, '__name__', type(stack.rotary).__name__)}"
        )
    if kind is not None:
        parameters, rope_type = parameters[kind], rope_type[kind]
    original = parameters.get("original_max_position_embeddings")
    if "dynamic" in rope_type or (rope_type == "longrope" and num_positions > (original or 0)):
        limit = f"; at most {original} positions have one" if rope_type == "longrope" else ""
        raise ValueError(
            f"rope_type must have one table for every sequence length, got {rope_type!r} and "
            f"{num_positions} positions{limit}"
        )
