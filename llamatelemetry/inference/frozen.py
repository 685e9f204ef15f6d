"""What a recording or a graph of a model's step has frozen."""

from __future__ import annotations

from copy import copy
from typing import Any

from llamatelemetry.models.patching import bindings

_NUMBERS = (bool, int, float, type(None))
# Of modules in general, and sizes of linears: their weights say them.
_OF_NO_STEP = {"training", "in_features", "out_features"}
# Of peft's layers: which adapters run, and by how much.
_OF_ADAPTERS = ("_disable_adapters", "_active_adapter", "scaling")


class Frozen:
    """Where a patched model's weights lie, the numbers and hooks of its modules, its config's
    numbers, and what its pieces are bound to, at one moment."""

    def __init__(self, model: Any) -> None:
        self._model, self._bindings = model, bindings(model)
        modules, config = list(model.modules()), model.config.get_text_config()
        self._modules = [(m._modules, *item) for m in modules for item in m._modules.items()]
        self._numbers = [  # an eps, a scale, a window
            (one.__dict__, name, value)
            for one in (*modules, config)
            for name, value in one.__dict__.items()
            if isinstance(value, _NUMBERS) and name[0] != "_" and name not in _OF_NO_STEP
        ]
        self._numbers += [
            (m.__dict__, name, copy(m.__dict__[name]))
            for m in modules
            if "_disable_adapters" in m.__dict__
            for name in _OF_ADAPTERS
            if name in m.__dict__
        ]
        self._hooks = [
            (hooks, len(hooks))
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        groups = [group for m in modules for group in (m._parameters, m._buffers)]
        self._tensors = [
            (group, name, tensor.data_ptr())
            for group in groups
            for name, tensor in group.items()
            if tensor is not None
        ]

    def holds(self) -> bool:
        """Whether it is still so, which takes a fraction of what making it takes."""
        return self.is_in_place() and self.is_alike()

    def is_alike(self) -> bool:
        """Whether all is still so but where the weights lie."""
        for entries, name, module in self._modules:
            if entries.get(name) is not module:
                return False
        for hooks, count in self._hooks:
            if len(hooks) != count:
                return False
        for attributes, name, value in self._numbers:
            if attributes.get(name) != value:
                return False
        now = bindings(self._model)
        return len(now) == len(self._bindings) and all(
            a is b for a, b in zip(now, self._bindings, strict=True)
        )

    def is_in_place(self) -> bool:
        """Whether the weights lie where they lay: what a graph reads elsewhere may be no memory."""
        for group, name, pointer in self._tensors:
            tensor = group.get(name)
            if tensor is None or tensor.data_ptr() != pointer:
                return False
        return True
