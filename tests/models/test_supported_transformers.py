"""The range of transformers that the package asks for is the one whose ends are tested."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[2]


def minor(version):
    return tuple(int(part) for part in version.split(".")[:2])


def test_the_ends_of_the_range_are_what_ci_runs():
    oldest, limit = re.search(
        r'"transformers>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text()
    ).groups()
    first, last = re.search(r"for version in (\S+) (\S+);", (ROOT / ".ci/run").read_text()).groups()
    assert first == oldest
    assert minor(limit) == (minor(last)[0], minor(last)[1] + 1)
    assert minor(oldest) <= minor(transformers.__version__) < minor(limit)
