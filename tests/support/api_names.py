"""Public names against tables of (name, default): signatures, fields and where a name stands."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest

_STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def rows(table: dict[str, dict[str, list[Any]]]) -> list[Any]:
    """A case for each name of a table {module: {name: parameters}}."""
    return [
        pytest.param(module, name, want, id=name)
        for module, names in table.items()
        for name, want in names.items()
    ]


def find(package: ModuleType, module: str, name: str) -> Any:
    """What a module of the package calls name, as Class.method too."""
    value: Any = importlib.import_module(f"{package.__name__}.{module}")
    for part in name.split("."):
        value = getattr(value, part)
    return value


def assert_signature(package: ModuleType, module: str, name: str, want: list[Any]) -> None:
    value = find(package, module, name)
    got = [
        _STARS.get(p.kind, "") + p.name if p.default is p.empty else (p.name, p.default)
        for p in inspect.signature(value).parameters.values()
        if p.name != "self"
    ]
    assert got == want
    assert value.__doc__
    if "." not in name:
        assert getattr(package, name) is value


def assert_fields(package: ModuleType, module: str, name: str, want: list[Any]) -> None:
    value = find(package, module, name)
    got = [
        f.name if f.default is dataclasses.MISSING else (f.name, f.default)
        for f in dataclasses.fields(value)
    ]
    assert got == want
    assert getattr(package, name) is value
