"""What a recording or a graph of a model's step has frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from llamatelemetry.models.patching import bindings

_NUMBERS = (bool, int, float, type(None))
# Of modules in general, and sizes of linears: their weights say them.
_OF_NO_STEP = {"training", "in_features", "out_features"}
# Of peft's layers: which adapters run, and by how much.
_OF_ADAPTERS = ("_disable_adapters", "_active_adapter", "scaling")


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor's changes are not counted; is_inference misses some
        return 0


class Frozen:
    """Where a patched model's weights lie, the numbers and hooks of its modules, its config's
    numbers, and what its pieces are bound to, at one moment."""

    def __init__(self, model: Any) -> None:
        # It is looked at with every token: C's loops over few objects, not one line an entry.
        self._model, self._bindings = model, bindings(model)
        modules, config = list(model.modules()), model.config.get_text_config()
        self._parents = [m._modules for m in modules if m._modules]
        self._children = _all_values(self._parents)
        owners = [(m.__dict__, _numbers_of(m)) for m in (*modules, config)]
        self._readers: Sequence[tuple[dict[str, Any], Callable[[Any], Any]]] = [
            (owned, itemgetter(*names)) for owned, names in owners if names
        ]
        self._numbers = self._numbers_now()
        self._adapters = [
            (m.__dict__, name, copy(m.__dict__[name]))
            for m in modules
            if "_disable_adapters" in m.__dict__
            for name in _OF_ADAPTERS
            if name in m.__dict__
        ]
        hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._no_hooks = [one for one in hooks if not one]
        self._hooks = [(one, len(one)) for one in hooks if one]
        groups = [group for m in modules for group in (m._parameters, m._buffers)]
        self._groups = [group for group in groups if any(x is not None for x in group.values())]
        self._pointers = self._pointers_now()

    def _numbers_now(self) -> list[Any]:
        """
        Raises:
            KeyError: one has gone.
        """
        return [read(owned) for owned, read in self._readers]

    def _pointers_now(self) -> list[int]:
        return [x.data_ptr() for group in self._groups for x in group.values() if x is not None]

    def holds(self) -> bool:
        """Whether it is still so, which takes a fraction of what making it takes."""
        return self.is_in_place() and self.is_alike()

    def is_alike(self) -> bool:
        """Whether all is still so but where the weights lie."""
        if any(self._no_hooks) or not _are_same(_all_values(self._parents), self._children):
            return False
        if any(len(hooks) != count for hooks, count in self._hooks):
            return False
        try:
            if self._numbers_now() != self._numbers:
                return False
        except KeyError:
            return False
        if any(owned.get(name) != value for owned, name, value in self._adapters):
            return False
        return _are_same(bindings(self._model), self._bindings)

    def versions(self) -> list[int]:
        """How often each weight was changed in place."""
        weights = (x for group in self._groups for x in group.values() if x is not None)
        return [version_of(weight) for weight in weights]

    def is_in_place(self) -> bool:
        """Whether the weights lie where they lay: what a graph reads elsewhere may be no memory."""
        return self._pointers_now() == self._pointers


def _numbers_of(owner: Any) -> list[str]:
    """Names of what an object computes with: an eps, a scale, a window."""
    return [
        name
        for name, value in owner.__dict__.items()
        if isinstance(value, _NUMBERS) and name[0] != "_" and name not in _OF_NO_STEP
    ]


def _all_values(groups: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, groups)))


def _are_same(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists are of the same objects."""
    return len(now) == len(before) and all(map(is_, now, before))
