"""What every piece is: it stands for one module, and understands how that one is called."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.spec import LayerSpec

# What the forward of an attention or a layer may be called with. transformers 5.24 renamed
# past_key_values to cache; a module's own signature says which of the two it has.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
# Of decoders that can have an encoder beside them: what hands a call over to the module's forward.
ENCODER_NAMES = ("encoder_hidden_states", "encoder_attention_mask")
KNOWN_TO_LAYERS = frozenset(
    {
        "hidden_states",
        "attention_mask",
        "position_embeddings",
        "position_ids",
        "use_cache",
        "output_attentions",
        *ENCODER_NAMES,
        *CACHE_NAMES,
    }
)


class Piece:
    """Stands for one module: puts its forward in the module's place, and takes it out again.

    Attributes:
        parameters: names of the parameters of the module's own forward, in order.

    Raises:
        ValueError, AttributeError: the module is not of the piece's kind after all, or its forward
            has a parameter that the piece does not know.
    """

    known: frozenset[str] = frozenset({"hidden_states", "x"})
    _watched: Sequence[tuple[dict[str, Any], str, object, str]] = ()  # nothing before install
    _part_hooks: Sequence[tuple[dict[int, Any], str]] = ()

    def __init__(
        self, module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet = NATIVE
    ) -> None:
        self.module: Any = module
        self.spec, self.config, self.ops = spec, config, ops
        self.width = int(config.hidden_size)
        self.original = module.forward
        self.parameters = parameters_of(self.original, self.known)
        self._replaced = {name: module.__dict__.get(name) for name in ("forward", "_apply")}
        self._apply_original = module._apply

    def bind(self) -> None:
        """Takes the module's tensors in hand; again whenever they have moved."""

    def bypassed(self) -> list[tuple[str, nn.Module]]:
        """The parts, by name, that the piece computes without calling them: all of its module's."""
        return [(name, part) for name, part in self.module.named_modules() if name]

    def watch(self) -> None:
        """Notes what the piece is bound to, for changed."""
        parts = [("", self.module), *self.bypassed()]
        watched = [
            (entries, key, value, f"{name}.{key}".lstrip("."))
            for name, part in parts
            for entries in (part._modules, part._parameters)
            for key, value in entries.items()
        ]
        watched += [
            (part.__dict__, "forward", part.__dict__.get("forward"), name)
            for name, part in parts[1:]
        ]
        self._watched = watched
        self._part_hooks = [
            (hooks, name)
            for name, part in parts[1:]
            for hooks in (part._forward_hooks, part._forward_pre_hooks)
        ]

    def changed(self) -> str | None:
        """Which part has been replaced or hooked since bind, so that the piece is not its module's.

        A tensor put into a parameter's data is not seen, nor is anything while Dynamo traces.
        """
        if torch.compiler.is_compiling():
            return None
        for entries, key, value, name in self._watched:
            if entries.get(key) is not value:
                return name
        for hooks, name in self._part_hooks:
            if hooks and has_hooks(hooks):
                return name
        return None

    def unbind(self) -> None:
        """Gives back what bind took."""

    def read_window(self) -> None:
        """Takes the sliding window from where the module has it, which the probe shortens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names that the module's own forward has for them."""
        return dict(zip(self.parameters, args, strict=False)) | dict(kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Piece:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise pickle.PicklingError(
            "a patched model cannot be pickled: call unpatch(model) first, and patch what is "
            "loaded, or save its state_dict"
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = self._apply_original(*args, **kwargs)
        self._rebind()
        return result

    def _loaded(self, *_: Any) -> None:
        self._rebind()

    def _rebind(self) -> None:
        self.bind()
        self.watch()

    def install(self) -> None:
        self.watch()
        self.module.forward = self.forward
        self.module._apply = self._apply
        self._hook = self.module.register_load_state_dict_post_hook(self._loaded)

    def remove(self) -> None:
        self._hook.remove()
        for name, value in self._replaced.items():
            self.module.__dict__.pop(name, None)
            if value is not None:
                self.module.__dict__[name] = value
        self.unbind()


def has_hooks(*hooks: Mapping[int, Any]) -> bool:
    """Whether forward hooks are more than those by which transformers collects hidden states."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith("transformers.")
        for each in hooks
        for hook in each.values()
    )


def eager_attention_of(module: nn.Module) -> Callable[..., Any]:
    """transformers' plain attention for this module; a subclass has its base class's."""
    for kind in type(module).__mro__:
        eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise ValueError("the module of the attention's class must have eager_attention_forward")


def parameters_of(forward: Callable[..., Any], known: frozenset[str]) -> tuple[str, ...]:
    """Names of forward's parameters, each of which must be a known one."""
    names = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name not in known:
            raise ValueError(
                f"forward's parameters must be among {sorted(known)}, got {parameter.name!r}"
            )
        names.append(parameter.name)
    if known.issuperset(CACHE_NAMES) and not set(CACHE_NAMES) & set(names):
        raise ValueError(
            f"forward must take the cache as one of {', '.join(CACHE_NAMES)}, got {names}"
        )
    return tuple(names)


def without_encoder(call: dict[str, Any]) -> bool:
    """Takes an encoder's arguments out of a call, and says whether it had none."""
    return all(call.pop(name, None) is None for name in ENCODER_NAMES)


def take_cache(call: dict[str, Any]) -> Any:
    """Takes the cache out of a call, under whichever of its names it comes."""
    given = [call.pop(name, None) for name in CACHE_NAMES]
    return next((cache for cache in given if cache is not None), None)
