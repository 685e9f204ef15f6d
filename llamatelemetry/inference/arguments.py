"""Types of what users pass, refused in a sentence that names the argument."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any


class ContextLengthError(ValueError):
    """A prompt, with the tokens that are to follow it, is longer than the model's context."""


def integer(name: str, value: Any) -> int:
    """value as an int: anything that Python takes for an index, but no truth value.

    Raises:
        ValueError: "<name> must be a whole number, got <value>".
    """
    if type(value) is int:
        return value
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        shown = repr(value) if len(repr(value)) <= 80 else type(value).__name__
        raise ValueError(f"{name} must be a whole number, got {shown}")
    return number


def at_least(name: str, value: Any, least: int) -> int:
    """value as an int that is no smaller.

    Raises:
        ValueError: as integer does, or "<name> must be at least <least>, got <value>".
    """
    if (number := integer(name, value)) < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def instance(name: str, value: Any, kind: type, wanted: str) -> None:
    """Refuses what is not of a kind.

    Raises:
        ValueError: "<name> must be <wanted>, got <the value's type>".
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {wanted}, got {type(value).__name__}")


def boolean(name: str, value: Any) -> bool:
    """value, a truth value.

    Raises:
        ValueError: "<name> must be True or False, got <value>".
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def real(name: str, value: Any) -> float:
    """value as a float: any real number, but no truth value.

    Raises:
        ValueError: "<name> must be a number, got <value>", or that it is too large for a float.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number below 1.8e308, got a larger one") from None
