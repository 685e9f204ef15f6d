"""The public names of llamatelemetry.profiling: signatures and defaults."""

from __future__ import annotations

import inspect

import pytest

import llamatelemetry.profiling as package

EMPTY = inspect.Parameter.empty
FUNCTIONS = {
    "profile_model": {"model": EMPTY, "input_data": EMPTY, "warmup": 3, "active": 5},
    "check_memory": {},
    "time_to_first_token": {"enqueued": EMPTY, "first_token": EMPTY},
    "time_per_output_token": {"first_token": EMPTY, "last_token": EMPTY, "num_tokens": EMPTY},
    "percentile": {"values": EMPTY, "q": EMPTY},
    "percentiles": {"values": EMPTY, "qs": (50, 95, 99)},
    "summarise": {"requests": EMPTY},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    function = getattr(package, name)
    parameters = inspect.signature(function).parameters
    assert {p.name: p.default for p in parameters.values()} == FUNCTIONS[name]
    assert function.__doc__


def test_every_public_name_is_there():
    classes = {"DeviceMemory", "ModelProfile", "OpTime", "RequestTimes"}
    assert set(package.__all__) == classes | set(FUNCTIONS)
    assert all(getattr(package, name).__doc__ for name in classes)
