"""Every implementation of flash_attn, on the device it is for."""

from __future__ import annotations

import pytest

from llamatelemetry.ops.backends import FLASH_BACKENDS


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = [name for name in FLASH_BACKENDS if name != "auto"]
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
                for n in names
            ],
        )
