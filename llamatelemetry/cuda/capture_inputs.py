"""Inputs of a captured function: how it is called with them, and what may replace them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def call_with(func: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """func with its inputs bound by name, or without any where it takes none.

    Raises:
        TypeError: func cannot be called, or takes neither.
    """
    if not callable(func):
        raise TypeError(f"CUDAGraph.capture: func must be callable, got {type(func).__name__}")
    if not isinstance(inputs, Mapping):
        raise TypeError(
            "CUDAGraph.capture: inputs must be a dict of name -> tensor, got "
            f"{type(inputs).__name__}"
        )
    try:
        signature = inspect.signature(func)
    except ValueError:  # a builtin without one
        return functools.partial(func, **inputs)
    for kwargs in (inputs, {}):
        try:
            signature.bind(**kwargs)
        except TypeError:
            continue
        return functools.partial(func, **kwargs)
    raise TypeError(
        f"CUDAGraph.capture: func must take {sorted(inputs) or 'no arguments'} by name or nothing, "
        f"got {signature}; name the missing ones in inputs"
    )


def check_input(name: str, buffer: Any, value: Any) -> None:
    """Refuses a new value that the buffer of a captured input cannot take.

    Raises:
        ValueError: another shape or dtype, or another value where the input is no tensor.
    """
    if isinstance(buffer, Tensor) and isinstance(value, Tensor):
        for what in ("shape", "dtype"):
            want, got = getattr(buffer, what), getattr(value, what)
            if want != got:
                want, got = (tuple(w) if what == "shape" else w for w in (want, got))
                raise ValueError(
                    f"CUDAGraph: input {name} must have the {what} {want} of its capture, got "
                    f"{got}; capture again for another {what}"
                )
    elif isinstance(buffer, Tensor) or isinstance(value, Tensor) or buffer != value:
        raise ValueError(
            f"CUDAGraph: input {name} must stay what it was at the capture, "
            f"{type(buffer).__name__}, got {type(value).__name__} {value!r}; capture again"
        )
