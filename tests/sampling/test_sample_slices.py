"""sample on rows that the CUDA kernels spread over blocks: the CPU kernel draws the same tokens."""

from __future__ import annotations

import pytest
import torch
from test_sample import FILTERS, columns, draws

from llamatelemetry.ops import sample


@pytest.mark.parametrize("top_p", [0.25, 0.75])
def test_equals_that_fill_a_row(device, top_p):
    # More tokens at the edge of top-p than a kernel has a list for.
    drawn = draws(torch.zeros(20_000, device=device), 64, top_p=top_p)
    assert drawn.min() >= round(20_000 * (1 - top_p))
    assert drawn.unique().numel() > 50


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [2047, 2049, 9001, 151936])
@pytest.mark.parametrize(
    "values",
    [
        *FILTERS,
        {"top_k": 600, "top_p": 0.9, "min_p": 0.01},
        {"top_k": 9000},
        {"temperature": 0.3, "top_p": 0.9},
        {"top_k": 2040, "top_p": 0.95},
        {"temperature": 5.0, "top_k": 60_000, "top_p": 0.9, "min_p": 0.001},
        {"temperature": 30.0, "top_p": 0.5},
        {"temperature": 1e-3, "top_k": 7, "top_p": 0.99},
    ],
    ids=str,
)
def test_gpu_draws_what_the_cpu_draws(dtype, vocab_size, values):
    logits = 2.5 * torch.randn(8, vocab_size)
    logits[1] = (2 * logits[1]).round() / 2  # many equal logits
    logits[2] = 1.5
    logits[3] = torch.nan
    logits[4, : vocab_size // 2] = -torch.inf
    logits[5] *= 100
    logits[6] += 1000
    logits = logits.to(dtype)
    parameters = columns(8, seed=range(8), offset=5, **values)
    on_gpu = sample(logits.cuda(), *(x.cuda() for x in parameters))
    assert on_gpu.tolist() == sample(logits, *parameters).tolist()
