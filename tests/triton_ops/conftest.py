"""The ops in Triton: on a GPU, or on the CPU where TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from interpreter import INTERPRETED


@pytest.fixture(autouse=True)
def _can_run(request):
    """A CPU's tests need the interpreter, which is a process of its own: test_interpreted.py."""
    needs_none = request.node.get_closest_marker("without_triton")
    if not needs_none and not INTERPRETED and not _is_on_gpu(request):
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU")
    torch.manual_seed(0)


def _is_on_gpu(request) -> bool:
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    return params.get("device") == "cuda"
