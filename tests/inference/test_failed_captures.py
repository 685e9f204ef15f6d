"""A step whose capture fails leaves torch able to draw, to allocate and to capture."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry.inference.step_graphs import StepGraphs

pytestmark = pytest.mark.gpu


def test_torch_draws_and_captures_as_before():
    device = torch.device("cuda", 0)
    graphs, x = StepGraphs(), torch.ones(64, device=device)
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: x.mul_(x.sum().item()), device)
    assert torch.rand(4, device=device).unique().numel() > 1
    x.fill_(1)
    replay = graphs.capture(lambda: x.add_(1), device)
    before = x.sum().item()
    replay()
    assert x.sum().item() == before + 64
