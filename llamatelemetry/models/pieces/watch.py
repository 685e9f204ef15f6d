"""What a piece was bound to, and whether that still stands: looked at on every call.

A replaced forward computes parts of its module without calling them. It may do so only while each
part is the object that it was bound to, of the class that was proved, without hooks, and its merged
weights are still the memory that the piece reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd

from llamatelemetry._native import kernels
from llamatelemetry.models.hf_kernels import is_transformed
from llamatelemetry.models.pieces.merge import is_plain, is_shared

Parts = Sequence[tuple[str, nn.Module]]  # a module's parts by name, itself first and as ""
SERVED = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of hidden states
FLOATS = (*SERVED, torch.float64)
_SERVES_CUDA = "rms_norm" not in kernels.without_cuda
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
# Hooks of every module there is; a part that is not called would not run them.
EVERYWHERE = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


class Kinds(NamedTuple):
    """What is alike in parts that differ in the values of their weights alone.

    Attributes:
        classes: of each part, with its forward and the functions that this one calls
        overridden: forwards of parts' own; where a piece has put one, the piece's class
        shapes: of parameters and buffers
    """

    classes: dict[str, Any]
    overridden: dict[str, Any]
    shapes: dict[str, torch.Size]

    def differ(self, proved: Kinds) -> str | None:
        """What is not as it was when a piece was proved, as the end of a sentence."""
        pairs = (
            (self.classes, proved.classes, "kind"),
            (self.overridden, proved.overridden, "forward"),
            (self.shapes, proved.shapes, "shape"),
        )
        for now, before, what in pairs:
            for name in (*now, *before):
                if now.get(name) != before.get(name):
                    return f"{name or 'it'} has another {what} than at patch"
        return None


class Watch:
    """A module's parts as they are now.

    Attributes:
        kinds: what must not differ for a piece to be bound to others.
    """

    def __init__(
        self,
        parts: Parts,
        merged: Iterable[nn.Module] = (),
        numbers: Iterable[tuple[Any, str]] = (),
    ) -> None:
        """
        Args:
            merged: parts whose weights the piece holds as one.
            numbers: (who has it, its name) of what the piece has read besides tensors.
        """
        inner = parts[1:]
        self._entries = [
            (entries, key, value, f"{name}.{key}".lstrip("."))
            for name, part in parts
            for entries in (part._modules, part._parameters, part._buffers)
            for key, value in entries.items()
        ]
        self._entries += [
            (part.__dict__, "forward", part.__dict__.get("forward"), name) for name, part in inner
        ]
        self._entries += [
            (vars(owner), name, vars(owner)[name], name)
            for owner, name in numbers
            if name in vars(owner)
        ]
        self._classes = [(part, type(part), name) for name, part in parts]
        kinds: set[Any] = {type(part) for _, part in parts}
        self._forwards = [(kind, kind.forward) for kind in kinds]
        own = {kind for kind in kinds if not kind.__module__.startswith("torch.")}
        used = {id(kind): functions_of(kind.forward) for kind in own}
        self._functions = [one for functions in used.values() for one in functions]
        self._hooks = [
            (hooks, name)
            for name, part in inner
            for hooks in (part._forward_hooks, part._forward_pre_hooks)
        ]
        self._hooks += [(hooks, "a part") for hooks in EVERYWHERE if inner]
        self._memory = [
            (tensor, tensor.data_ptr(), tensor.numel(), name)
            for name, part in inner
            if any(part is one for one in merged)
            for tensor in (*part._parameters.values(), *part._buffers.values())
            if tensor is not None and is_plain(tensor)
        ]
        self.kinds = Kinds(
            {
                name: (
                    type(part),
                    type(part).forward,
                    *(_likeness(value) for _, _, value in used.get(id(type(part)), ())),
                )
                for name, part in parts
            },
            {
                name: _owner_of(vars(part)["forward"])
                for name, part in inner
                if "forward" in vars(part)
            },
            {
                f"{name}.{key}".lstrip("."): tensor.shape
                for name, part in parts
                for key, tensor in (*part._parameters.items(), *part._buffers.items())
                if tensor is not None
            },
        )

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor, _, _, _ in self._memory]

    def broken(self, hooks: bool = True, memory: bool = True) -> str | None:
        """What no longer stands, as a sentence.

        Args:
            hooks, memory: whether hooks count, and the place of merged weights and the functions
                of files, which are no guards of a graph.
        """
        for entries, key, value, name in self._entries:
            if entries.get(key) is not value:
                return f"{name} has been replaced since patch"
        for part, kind, name in self._classes:
            if type(part) is not kind:
                return f"{name or 'it'} has another forward than at patch"
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return f"{kind.__name__} has another forward than at patch"
        if hooks and (reason := self._hooked()) is not None:
            return reason
        for values, name, function in self._functions if memory else ():
            if values.get(name) is not function:
                return f"{name} has been replaced since patch"
        for tensor, pointer, count, name in self._memory if memory else ():
            if tensor.data_ptr() != pointer or tensor.numel() != count:
                return f"{name} has other weights since patch"
        return None

    def _hooked(self) -> str | None:
        for hooks, name in self._hooks:
            if hooks and has_hooks(hooks):
                return f"{name} carries forward hooks, which the replacement would not run"
        return None

    def obstacle(
        self, proved: Kinds | None, linears: Sequence[nn.Module], held: Sequence[Tensor]
    ) -> str | None:
        """Why a piece that was proved on other parts may not be bound to these; None if it may.

        Args:
            proved: the parts when the piece was proved.
            linears: parts whose weights would be merged.
            held: tensors that the piece itself holds from before.
        """
        if (reason := self._hooked()) is not None:
            return reason
        if proved is not None and (reason := self.kinds.differ(proved)) is not None:
            return reason
        return _why_not_to_move(linears, held) if len(linears) > 1 else None


def _why_not_to_move(linears: Sequence[nn.Module], held: Sequence[Tensor]) -> str | None:
    """Why weights may not become views of one tensor: writes through others would be lost."""
    tensors = [x for one in linears for x in (*one.parameters(), *one.buffers())]
    if not all(map(is_plain, tensors)):
        return "its weights must be plain memory, each a tensor of its own"
    known = {id(x): x.untyped_storage().data_ptr() for x in (*tensors, *held) if is_plain(x)}
    pointers = list(known.values())
    for tensor in tensors:
        if is_shared(tensor, pointers.count(known[id(tensor)])):
            return "something else holds the memory of its weights, and a copy would not follow it"
    return None


def _owner_of(forward: Any) -> Any:
    """The class that a bound method is of, which a copy of it shares; a function itself."""
    return type(forward.__self__) if isinstance(forward, MethodType) else forward


@cache
def _names_of_functions(code: CodeType) -> frozenset[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(code.co_names).union(*map(_names_of_functions, inner))


def functions_of(forward: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """(globals, name, function) of the functions of its file that a forward calls by name: others
    may be put there."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return []
    values = inspect.unwrap(forward).__globals__
    names = sorted(_names_of_functions(code))
    return [(values, n, values[n]) for n in names if isinstance(values.get(n), FunctionType)]


def _likeness(function: FunctionType) -> tuple[Any, ...]:
    """What tells functions of one name apart, in a pickle too."""
    code = function.__code__
    return function.__module__, function.__qualname__, crc32(code.co_code), code.co_names


def has_hooks(*hooks: Mapping[int, Any]) -> bool:
    """Whether forward hooks are more than those by which transformers collects hidden states."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith("transformers.")
        for each in hooks
        for hook in each.values()
    )


def has_gradients(module: nn.Module, call: Sequence[Any]) -> bool:
    """Whether a module's weights or the arguments of its call require gradients."""
    return any(map(_has_gradients, call)) or any(p.requires_grad for p in module.parameters())


def in_another_mode(module: nn.Module, dtype: torch.dtype | None, x: Any) -> bool:
    """Whether a call asks for what our ops do not do: other dtypes, vmap, dropout.

    Args:
        module: what is called.
        dtype: of its weights; None where none says it.
        x: the hidden states.
    """
    if not isinstance(x, Tensor) or x.dtype not in SERVED or (dtype or x.dtype) != x.dtype:
        return True
    if module.training and any(map(_drops, module.modules())):
        return True
    if _is_any_autocast_enabled():
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
            return True
    return not (x.is_cpu or (_SERVES_CUDA and x.is_cuda) or x.is_meta) or is_transformed()


def _drops(part: nn.Module) -> bool:
    """Whether a module in training leaves values out at random."""
    rates = [value for name, value in vars(part).items() if "drop" in name]
    if isinstance(part, _DropoutNd):
        rates.append(part.p)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _has_gradients(value: Any) -> bool:
    """Whether gradients go to an argument: a tensor, several, or a cache that holds some."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, (tuple, list)):
        return any(map(_has_gradients, value))
    layers = getattr(value, "layers", ())  # of transformers' caches
    return any(
        _has_gradients(getattr(layer, name, None))
        for layer in (layers if isinstance(layers, (tuple, list)) else ())
        for name in ("keys", "values")
    )
