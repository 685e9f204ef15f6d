"""Requests for ContinuousBatching, what they give alone, and whether a batcher is empty again."""

from __future__ import annotations

import torch

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY, SamplingParams

PAGE = 4
WARM = SamplingParams(temperature=1.5, seed=3)
# Long and short ones, and prefixes that are shared.
PROMPTS = [[5, 9, 2], [7], list(range(3, 30)), [*range(3, 23), 1], [11, 3, 8, 1, 40, 22, 17]]
COUNTS = [12, 30, 9, 14, 1]


def alone(model, prompt, count, params=GREEDY):
    return [t for (t,) in TokenGenerator(model).generate([prompt], [params], count)]


def assert_text(model, prompt, ours, wanted):
    """Equal up to a token where the two best logits are as good as equal."""
    differs = next(
        (i for i, pair in enumerate(zip(ours, wanted, strict=True)) if len({*pair}) > 1), None
    )
    if differs is not None:
        ids = torch.tensor([prompt + wanted[:differs]], device=model.device)
        best = model(ids).logits[0, -1].topk(2).values
        assert best[0] - best[1] < 1e-3, (ours, wanted)


def is_free(batcher):
    scheduler = batcher._batch.scheduler
    scheduler.check()
    return (
        not batcher._batch.open
        and not scheduler.running
        and not scheduler.waiting
        and scheduler.blocks.num_available == scheduler.blocks.num_blocks
    )
