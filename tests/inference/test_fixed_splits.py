"""With split_size no bit of a request's tokens depends on who comes, goes or fails beside it."""

from __future__ import annotations

import pytest
import torch
from batching import PAGE, is_free
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import SamplingParams

WARM = SamplingParams(temperature=1.3, seed=7)
PROMPT = list(range(20, 62))  # in two chunks


def observed(batcher):
    """Two requests, of which one shows the bits that its tokens were drawn from."""
    return [
        batcher.submit(PROMPT, WARM, 40),
        batcher.submit(PROMPT[:9], WARM, 40, logits=LogitOptions(logprobs=2)),
    ]


def results(handles):
    for handle in handles:
        handle.result()
    return [(handle.token_ids, handle.logprobs) for handle in handles]


@pytest.mark.parametrize("overlap", [False, True])
def test_every_bit_is_that_of_the_requests_alone(device, monkeypatch, overlap):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)
    model = tiny_model("llama", device)
    options = {"split_size": 64, "max_step_tokens": 30, "overlap": overlap}
    wanted = results(observed(ContinuousBatching(6, model, **options)))
    prefill = StepRunner.prefill

    def poisoned(self, chunks, width):
        if any(96 in chunk.tokens for chunk in chunks):
            raise RuntimeError("poison")
        return prefill(self, chunks, width)

    monkeypatch.setattr(StepRunner, "prefill", poisoned)
    batcher = ContinuousBatching(6, model, **options)
    others = [batcher.submit([5, 9, 2], WARM, 6)]
    batcher.step()
    handles = observed(batcher)
    for i in range(4):
        batcher.step()
        others.append(batcher.submit(list(range(3 + i, 50)), WARM, 30))  # of other widths
    bad = batcher.submit([3, 96, 4], WARM, 8)
    for _ in range(5):
        batcher.step()
    others[1].cancel()
    assert results(handles) == wanted
    with pytest.raises(RuntimeError, match="poison"):
        bad.result()
    batcher.run()
    assert is_free(batcher)


def test_a_prompts_last_token_goes_the_way_that_siblings_have_it_go(device, monkeypatch):
    """A prompt of 24 + 1 tokens, whose last one alone would be a decode step's."""
    batcher = ContinuousBatching(6, tiny_model("llama", device), split_size=64, max_step_tokens=30)
    prefill, counts = StepRunner.prefill, []

    def counted(self, chunks, width):
        counts.append([len(chunk.tokens) for chunk in chunks])
        return prefill(self, chunks, width)

    monkeypatch.setattr(StepRunner, "prefill", counted)
    found = [batcher.submit(PROMPT[:25], WARM, 9).result().token_ids]
    assert counts == [[24], [1]]
    handles = batcher.submit_group(PROMPT[:25], [WARM, SamplingParams(seed=1)], 9)
    found.append(handles[0].result().token_ids)
    assert counts == [[24], [1]] * 2
    assert found[0] == found[1]


def test_refusals():
    model = tiny_model("llama", torch.device("cpu"))
    with pytest.raises(ValueError, match="split_size must be a multiple of 64, got 100"):
        ContinuousBatching(2, model, split_size=100)
    with pytest.raises(ValueError, match="must be at least 5 with max_batch_size 4"):
        ContinuousBatching(4, model, split_size=64, max_step_tokens=4)
