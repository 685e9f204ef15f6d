"""A config object may be that of several models: what one of them chooses is not the others'.

A view of a config is in all an object of its class, of the same attributes, which an edit of either
changes, but for those that a view keeps to itself: the attention that is chosen, its causality, and
the views of configs inside.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

_ATTENTION = "_attn_implementation_internal"


class _View:
    """What a view's class has before its config's class.

    Attributes:
        _original: the config
        _own: what the view keeps to itself
        _inside: views of configs that are attributes of this one, by their names
    """

    __slots__ = ()
    _kind: type
    _original: Any
    _own: dict[str, Any]
    _inside: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._kind(*args, **kwargs)  # one made of a view's class is no view

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """In place of transformers', which makes a dataclass of each subclass."""

    def __eq__(self, other: object) -> bool:
        return bool(original_of(self) == original_of(other))

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Any:
        twin: Any = object.__new__(self._kind)
        twin.__dict__.update(self.__dict__, **{_ATTENTION: self._own[_ATTENTION]})
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _view, (self._original, self._own, self._inside)


def _view(original: Any, own: dict[str, Any], inside: dict[str, Any]) -> Any:
    kind: Any = type(original)
    view: Any = object.__new__(_view_class(kind))
    object.__setattr__(view, "__dict__", original.__dict__)
    for name, value in (("_original", original), ("_own", own), ("_inside", inside)):
        object.__setattr__(view, name, value)
    return view


@cache
def _view_class(kind: Any) -> type:
    names = {
        "__slots__": ("_inside", "_original", "_own"),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_kind": kind,
        _ATTENTION: property(_attention, _choose_attention),
        "is_causal": property(_is_causal, _set_is_causal, _del_is_causal),
    }
    names |= {key: _inner(key) for key in kind.sub_configs}
    made: type = type(kind)(kind.__name__, (_View, kind), names)
    return made


def _attention(view: Any) -> Any:
    return view._own[_ATTENTION]


def _choose_attention(view: Any, value: Any) -> None:
    view._own[_ATTENTION] = value


def _is_causal(view: Any) -> Any:
    for values in (view._own, view.__dict__):
        if "is_causal" in values:
            return values["is_causal"]
    raise AttributeError(f"{type(view).__name__} has no attribute is_causal")


def _set_is_causal(view: Any, value: Any) -> None:
    # A forward of transformers writes what it was called with, and back what it found.
    (view._own if "is_causal" in view._own else view.__dict__)["is_causal"] = value


def _del_is_causal(view: Any) -> None:
    del view.__dict__["is_causal"]


def _inner(key: str) -> property:
    """A config inside: its view, as long as it is the one that was viewed."""

    def get(view: Any) -> Any:
        value, inner = view.__dict__.get(key), view._inside.get(key)
        return inner if inner is not None and inner._original is value else value

    def put(view: Any, value: Any) -> None:
        view.__dict__[key] = original_of(value)

    return property(get, put)


def original_of(config: Any) -> Any:
    """The config that is viewed; any other object itself."""
    return config._original if isinstance(config, _View) else config


def views_of(configs: list[Any]) -> list[tuple[Any, Any]]:
    """(a config, its view) for each of the configs, those inside of others last."""
    views: dict[int, Any] = {}
    for config in reversed(configs):
        original = original_of(config)
        inside = {key: views.get(id(getattr(config, key, None))) for key in config.sub_configs}
        own = dict(config._own) if isinstance(config, _View) else {}
        own.setdefault(_ATTENTION, config._attn_implementation)
        views[id(config)] = _view(original, own, inside)
    return [(config, views[id(config)]) for config in configs]


def exchange(model: nn.Module, pairs: list[tuple[Any, Any]]) -> None:
    """Puts the second of each pair where a module of the model has the first."""
    others = {id(old): new for old, new in pairs}
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) in others:
                vars(module)[name] = others[id(value)]


def lift_causality(configs: list[Any]) -> None:
    """Has transformers make the masks of views without causality."""
    for config in configs:
        config._own["is_causal"] = False


def restore_causality(configs: list[Any]) -> None:
    """Undoes lift_causality."""
    for config in configs:
        config._own.pop("is_causal", None)
