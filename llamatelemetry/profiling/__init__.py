"""Measuring a model: times of requests, a profile of its forward, memory."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "memory": ("DeviceMemory", "check_memory"),
    "metrics": (
        "RequestTimes",
        "percentile",
        "percentiles",
        "summarise",
        "time_per_output_token",
        "time_to_first_token",
    ),
    "model": ("ModelProfile", "OpTime", "profile_model"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
