"""One request fails in what is its own; the others stay as they are, bit for bit."""

from __future__ import annotations

import pytest
import torch
from batching import PAGE, PROMPTS, is_free
from http_servers import tiny_engine

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.sampling import SamplingParams

WARM = SamplingParams(temperature=1.2, seed=3)
TOLD = LogitOptions(presence_penalty=0.3, logprobs=2)


class Matcher:
    """A grammar that allows everything until it fails."""

    is_complete = False

    def __init__(self, fails_in):
        self.fails_in, self.count = fails_in, 0

    def fill(self, words, row):
        self.count += 1
        if self.fails_in == "fill" and self.count == 3:
            raise RuntimeError("the grammar's mask failed")

    def accept(self, token):
        if self.fails_in == "accept" and self.count == 3:
            raise RuntimeError("the grammar refused")


class Grammar:
    def __init__(self, fails_in):
        self.fails_in = fails_in

    def matcher(self):
        return Matcher(self.fails_in)


def bad(batcher, kind):
    logits = (
        LogitOptions(grammar=Grammar(kind))
        if kind in ("fill", "accept")
        else LogitOptions(0.3, logprobs=2)
    )
    handle = batcher.submit([4, 9, 1], WARM, 12, logits=logits)
    if kind == "text":
        push, count = handle.request.text.push, iter(range(99))

        def fails(token):
            if next(count) == 3:
                raise RuntimeError("the tokenizer failed")
            return push(token)

        handle.request.text.push = fails
    if kind == "logits":  # whatever a request's penalties look at
        handle.asked.options.__dict__["frequency_penalty"] = "none"
    return handle


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def test_a_request_that_fails_changes_no_bit_of_another():
    engine = tiny_engine()

    def run(kind):
        batcher = ContinuousBatching(8, engine, share_prefixes=False)
        good = [batcher.submit(p, WARM, 12, logits=TOLD) for p in PROMPTS[:2]]
        good += [batcher.submit(p, WARM, 12) for p in PROMPTS[2:4]]
        batcher.step()
        failing = None if kind is None else bad(batcher, kind)
        batcher.run()
        assert is_free(batcher)
        return [(h.result().token_ids, h.logprobs) for h in good], failing

    wanted, _ = run(None)
    for kind in ("fill", "accept", "text", "logits"):
        found, failing = run(kind)
        with pytest.raises((RuntimeError, TypeError)):
            failing.result()
        assert failing.request.finish_reason == "error"
        assert found == wanted, kind


def test_a_row_of_nan_is_an_error_of_its_own():
    from llamatelemetry.inference.drawing import Asked, Drawn, draw
    from llamatelemetry.inference.scheduled_request import ScheduledRequest

    torch.manual_seed(0)
    logits = torch.randn(3, 20)
    requests = [ScheduledRequest(i, [1], 5) for i in range(3)]
    asked = [Asked(WARM, TOLD)] * 3
    before = draw(logits.clone(), requests, asked)
    logits[1, 4] = torch.nan
    first, nan, last = draw(logits.clone(), requests, asked)
    assert isinstance(nan, FloatingPointError)
    assert [first, last] == [before[0], before[2]]
    assert all(isinstance(one, Drawn) for one in before)
