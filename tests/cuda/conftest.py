"""A machine without CUDA for any test, and torch's switches after each test as before."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def no_cuda(monkeypatch):
    """A machine without CUDA, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _switches():
    """torch's switches are after each test as before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    tf32 = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32
