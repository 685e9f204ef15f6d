"""Public names that a package loads when they are first used: importing it costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package's __init__ binds to ``__getattr__, __dir__, __all__``.

    The same names stand in the __init__ under TYPE_CHECKING for type checkers and editors;
    tests/package/test_names.py compares the two.

    Args:
        package: The package's ``__name__``.
        names: Submodule -> the public names that it holds; a submodule may have none of its own.
    """
    owner = {name: module for module, held in names.items() for name in held}

    def load(name: str) -> Any:
        if name in owner:
            value = getattr(import_module(f"{package}.{owner[name]}"), name)
        elif name in names:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # found without us from now on
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names, *owner})

    return load, list_names, sorted(owner)
