"""Perplexities of texts, each read as one prompt of the engine's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from llamatelemetry.inference.runner import PAGE_SIZE, StepRunner
from llamatelemetry.inference.step import Chunk


def perplexities(model, texts: Sequence[list[int]]) -> list[float]:
    """Of a patched model, each text's; a text holds at least two ids."""
    longest = max(map(len, texts)) - 1
    blocks = list(range(-(-longest // PAGE_SIZE)))
    runner = StepRunner(model)
    runner.ready(longest, len(blocks), keep=False)
    found = []
    for ids in texts:
        every = list(range(len(ids) - 1))
        logits = runner.prefill([Chunk(ids[:-1], 0, blocks)], len(blocks), every)
        wanted = torch.tensor(ids[1:], device=logits.device)
        found.append(functional.cross_entropy(logits.double(), wanted).exp().item())
    return found
