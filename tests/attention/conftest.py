"""Every implementation of flash_attn, on the device it is for."""

from __future__ import annotations

import pytest

from llamatelemetry._native.facts import ATTENTION_BACKENDS


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        marks = {"sm80": pytest.mark.sm80, "sm90": pytest.mark.sm90}
        metafunc.parametrize(
            "backend",
            [
                pytest.param(
                    n,
                    marks=[]
                    if n == "cpu"
                    else [pytest.mark.gpu, *([marks[n]] if n in marks else [])],
                )
                for n in ATTENTION_BACKENDS
            ],
        )
