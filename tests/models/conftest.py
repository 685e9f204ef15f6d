"""Tiny models run faster on one thread than on several."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)
