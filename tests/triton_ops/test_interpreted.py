"""Runs this folder's tests again where Triton's interpreter stands for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreter import INTERPRETED, assert_passes_interpreted


@pytest.mark.slow
@pytest.mark.without_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_this_folder_with_the_interpreter():
    assert_passes_interpreted("-x", str(Path(__file__).parent))
