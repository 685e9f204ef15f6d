"""What a model of a class without a row may be, by the names of its modules: specs to be tried."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from llamatelemetry.models.families import FAMILIES, Family
from llamatelemetry.models.spec import LayerSpec
from llamatelemetry.models.stack import Stack, stack_of

_ROPES = (("half", "halves"), ("interleaved", "halves"), ("interleaved", "pairs"))


def find_stack(model: Any, refused: Callable[[Stack], Mapping[str, str]]) -> Stack:
    """The decoder layers in a model: of a row's class, or else the stack and spec of which the
    probe refuses least, no first layer among it. An attention that no spec describes stays.

    Args:
        refused: says which modules of a stack may not be replaced.

    Raises:
        ValueError: there are none.
    """
    try:
        return stack_of(model)
    except ValueError:
        if not isinstance(model, nn.Module) or (best := _best_guess(model, refused)) is None:
            raise
        return best


def _best_guess(model: nn.Module, refused: Callable[[Stack], Mapping[str, str]]) -> Stack | None:
    best: tuple[int, Stack] | None = None
    for kind in ("projected", "own"):
        for stack in guesses(model, kind):
            left = refused(stack)
            if stack.layer_name(0) not in left and (best is None or len(left) < best[0]):
                best = len(left), stack
                if not left:
                    return stack
    return None if best is None else best[1]


def guesses(model: nn.Module, kind: str) -> Iterator[Stack]:
    """Stacks inside a model that are built as a row says, each with a spec that may be its own.

    A stack counts only where nothing of it would be left out: every module and parameter of its
    first layer has a name in the spec. What the modules compute is for the probe to say.

    Args:
        kind: the spec's attention_kind; the parts of an "own" attention may be any.
    """
    for path, module in model.named_modules():
        if not hasattr(module, "config"):
            continue
        found: list[Family] = []
        for row in FAMILIES.values():
            for spec in _specs(row, module, kind):
                family = Family(module.config.model_type, spec, row.parts, type(module).__name__)
                if family not in found:
                    found.append(family)
        yield from (Stack(family, path, module) for family in found)


def _specs(row: Family, module: Any, kind: str) -> Iterator[LayerSpec]:
    """The row's spec as far as it fits the module's first layer, with each kind of rotation."""
    parts, spec = row.parts, row.spec
    layers = getattr(module, parts.layers, None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return
    named = [parts.norm, parts.embedding, parts.positions]
    if spec.rope != "none":
        named.append(parts.rotary)
    layer, config = layers[0], module.config
    attention = getattr(layer, spec.attention, None)
    if attention is None or not all(hasattr(module, name) for name in named if name):
        return
    if spec.mlp_kind in ("gated", "ungated"):
        mlp = getattr(layer, spec.mlp, None)
        if not _is_made_of(mlp, (*spec.gate_up, spec.down)):
            spec = replace(spec, mlp_kind="own")
    if spec.window and not any(hasattr(x, spec.window) for x in (attention, config)):
        spec = replace(spec, window="")
    if not spec.window and hasattr(config, "sliding_window"):
        spec = replace(spec, window="sliding_window")
    if not _fits_layer(spec, layer):
        return
    if kind == "projected" and not _fits_attention(spec, attention):
        return
    owners = {
        "embedding_multiplier": module,
        "logits_scaling": config,
        "logit_scale": config,
        "final_softcap": config,
        "activation": config if spec.mlp_kind != "own" else None,
        "parallel": config if isinstance(spec.parallel, str) else None,
    }
    for field, owner in owners.items():
        name = getattr(spec, field)
        if name and owner is not None and not hasattr(owner, name):
            return
    if kind == "own":
        yield replace(spec, attention_kind="own", window="sliding_window")
        return
    yield spec
    if spec.rope != "none":
        for rope, angles in _ROPES:
            yield replace(spec, rope=rope, rope_angles=angles)  # type: ignore[arg-type]


def _fits_layer(spec: LayerSpec, layer: Any) -> bool:
    if not all(hasattr(layer, name) for name in spec.norms):
        return False
    if spec.residual_multiplier and not hasattr(layer, spec.residual_multiplier):
        return False
    of_mlp = (*spec.gate_up, spec.down) if spec.mlp_kind == "plain" else (spec.mlp,)
    return _is_made_of(layer, (*spec.norms, spec.attention, *of_mlp))


def _fits_attention(spec: LayerSpec, attention: Any) -> bool:
    norms = spec.qk_norm_names if spec.qk_norm != "none" else ()
    use_rope = "" if spec.use_rope == "window" else spec.use_rope
    names = (spec.head_dim, spec.scale, spec.softcap, spec.sinks, use_rope)
    if not all(hasattr(attention, name) for name in names if name):
        return False
    # What it is told beside the angles may matter at positions that no probe comes to.
    if "position_ids" in inspect.signature(attention.forward).parameters:
        return False
    sinks = (spec.sinks,) if spec.sinks else ()
    return _is_made_of(attention, (*spec.qkv, spec.output, *norms), sinks)


def _is_made_of(module: Any, names: tuple[str, ...], parameters: tuple[str, ...] = ()) -> bool:
    """Whether a module has just these parts, but for parts that hold no tensors."""
    if not isinstance(module, nn.Module):
        return False
    parts = {
        name
        for name, part in module.named_children()
        if name in names or any(True for _ in part.parameters())
    }
    own = {name for name, _ in module.named_parameters(recurse=False)}
    absent = {name for name in names if getattr(module, name, module) is None}
    return parts | absent == set(names) and own == set(parameters)
