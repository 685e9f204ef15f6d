"""Triton's interpreter where the variable asks for it, and a machine without CUDA for any test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def no_cuda(monkeypatch):
    """A machine without CUDA, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
