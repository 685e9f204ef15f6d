"""Refusals of what the server calls, in the words of its clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def named(fields: Mapping[str, str]) -> Iterator[None]:
    """Refusals made in it begin with a request's field in the place of an argument of Python's.

    Args:
        fields: the field for each argument that a refusal may begin with; the first that fits
            holds.

    Raises:
        ValueError: as it was raised, of its own kind, with the field's name.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for argument, field in fields.items():
            rest = text.removeprefix(argument)
            if rest != text and not rest[:1].isidentifier():  # another, longer name
                error.args = (field + rest,)
                break
        raise
