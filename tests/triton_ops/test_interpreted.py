"""Runs this folder's tests again where Triton's interpreter stands for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str | None:
    """Why the interpreter cannot run here; None if it can."""
    triton = pytest.importorskip("triton")
    numpy = pytest.importorskip("numpy")
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        return "this Triton's interpreter cannot loop with numpy 2.4"
    return None


@pytest.mark.slow
@pytest.mark.without_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
def test_this_folder_with_the_interpreter():
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(folder)]
    run = subprocess.run(
        command,
        cwd=folder.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
