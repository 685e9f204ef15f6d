"""Sampling in Triton: the tokens that the reference draws."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_refuses
from torch.library import opcheck

pytest.importorskip("triton")

from llamatelemetry.ops import reference
from llamatelemetry.triton_ops import sampling


def columns(device, rows):
    """Tensors of (temperature, top_k, top_p, min_p, seed, offset) rows."""
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    return [
        torch.tensor(column, dtype=kind, device=device)
        for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)
    ]


SETTINGS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "cold": (0.3, 0, 1.0, 0.0),
    "top-k": (1.0, 3, 1.0, 0.0),
    "top-p": (1.0, 0, 0.7, 0.0),
    "tiny top-p": (1.0, 0, 1e-6, 0.0),
    "min-p": (1.0, 0, 1.0, 0.2),
    "all": (0.8, 20, 0.9, 0.05),
}


@pytest.mark.parametrize("vocab_size", [1, 50, 5000])
def test_draws_what_the_reference_draws(device, vocab_size):
    """Rows of a batch, each with settings of its own; 5000 logits are two blocks."""
    on_gpu = device.type == "cuda"
    repeats = 6 if on_gpu else 1
    kinds = SETTINGS if on_gpu or vocab_size == 50 else ("greedy", "plain", "all")
    rows = [(*SETTINGS[kind], 2**40 + 3, i) for kind in kinds for i in range(repeats)]
    logits = torch.randn(len(rows), vocab_size, device=device) * 2
    args = columns(device, rows)
    assert sampling.sample(logits, *args).tolist() == reference.sample(logits, *args).tolist()


def test_equals_at_the_border(device):
    """Quantised logits have many: top-k keeps all of them, top-p the higher ids."""
    settings = ((1.0, 5, 1.0, 0.0), (1.0, 0, 0.4, 0.0), (1.0, 12, 0.5, 0.0))
    rows = [
        (*setting, 7, i) for setting in settings for i in range(8 if device.type == "cuda" else 2)
    ]
    logits = torch.randint(0, 3, (len(rows), 40), device=device).float()
    args = columns(device, rows)
    assert sampling.sample(logits, *args).tolist() == reference.sample(logits, *args).tolist()


def test_what_is_no_number(device):
    logits = torch.zeros(5, 20, device=device)
    logits[0, :] = torch.nan
    logits[1, 3], logits[1, 5] = torch.nan, 1.0
    logits[2, 7] = torch.inf
    logits[3, :] = -torch.inf
    logits[4, :10] = -torch.inf
    for temperature in (0.0, 1.0):
        args = columns(device, [(temperature, 0, 1.0, 0.0, 1, i) for i in range(5)])
        assert sampling.sample(logits, *args).tolist() == reference.sample(logits, *args).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_of_any_stride(device, dtype):
    logits = torch.randn(3, 64, device=device).to(dtype)[:, :50]
    args = columns(device, [(0.0, 0, 1.0, 0.0, 1, 0)] * 3)
    assert sampling.sample(logits, *args).tolist() == logits.float().argmax(-1).tolist()


def test_opcheck_and_refusals(device):
    logits = torch.randn(2, 30, device=device)
    args = columns(device, [(1.0, 0, 1.0, 0.1, 1, i) for i in range(2)])
    opcheck(torch.ops.llamatelemetry_triton.sample.default, (logits, *args))
    assert_refuses(lambda: sampling.sample(logits, args[0][:1], *args[1:]), "temperature", "[2]")
    assert_refuses(lambda: sampling.sample(logits[:, :0], *args), "logits", "0")
