"""What stands in a model's ``forward``: several may stand on each other, and each can go."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn


class StandIn:
    """Stands in a model's ``forward`` and knows the one that it replaced.

    Args:
        model: whose forward it runs; ``install`` puts it there.

    Attributes:
        replaced: what stood in the model's ``__dict__``, if anything did.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._stand_on(model.__dict__.get("forward"), model.forward)
        self._start()

    def _stand_on(self, replaced: Any, original: Any) -> None:
        self.replaced = replaced
        self.__wrapped__ = self._original = original  # its signature is this one's

    def _start(self) -> None:
        """Makes what no copy of the model shares."""

    def clear(self) -> None:
        """Frees what was made for the forward below."""

    def install(self) -> None:
        self._model.forward = self

    def remove(self) -> None:
        """Takes this one out, whatever stands on it."""
        self.clear()
        above = self._model.__dict__["forward"]
        if above is self:
            del self._model.forward
            if self.replaced is not None:
                self._model.forward = self.replaced
            return
        while above.replaced is not self:
            above = above.replaced
        above.clear()
        above._stand_on(self.replaced, self._original)

    def __getstate__(self) -> dict[str, Any]:
        names = ("replaced", "__wrapped__", "_original", "_model")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a copy of the model makes its own
        self._start()


_Kind = TypeVar("_Kind", bound=StandIn)


def standing(model: nn.Module, kind: type[_Kind]) -> _Kind | None:
    """The one of this kind in a model's ``forward``, or under others there."""
    forward = model.__dict__.get("forward")
    while forward is not None and not isinstance(forward, kind):
        forward = getattr(forward, "replaced", None)
    return forward
