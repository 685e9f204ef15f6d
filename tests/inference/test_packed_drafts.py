"""Drafts and prompts in one forward: a GPU's steps, which a CPU takes here too."""

from __future__ import annotations

import pytest
from batching import COUNTS, PAGE, PROMPTS, is_free
from drafting import PARAMS, SPECULATION, draft_from
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.runner import StepRunner

EACH = [{}, {"logits": LogitOptions(frequency_penalty=0.8, logprobs=1)}, {}, {"min_tokens": 9}, {}]


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


@pytest.fixture
def model(device):
    return tiny_model("llama", device)


@pytest.fixture
def forwards(monkeypatch):
    """What is to become a list of forwards: tokens of each chunk of an eager one, and what they
    keep."""
    found, prefill = [], StepRunner.prefill

    def noted(self, chunks, width, kept=None, **more):
        found.append(([len(chunk.tokens) for chunk in chunks], kept))
        return prefill(self, chunks, width, kept, **more)

    monkeypatch.setattr(StepRunner, "prefill", noted)
    return found


def served_one_after_the_other(model, speculation):
    batcher = ContinuousBatching(4, model, speculation=speculation, prefill_chunk=7)
    batcher._batch._runner.packs = True
    handles = []
    for prompt, params, count, options in zip(PROMPTS, PARAMS, COUNTS, EACH, strict=True):
        handles.append(batcher.submit(prompt, params, count + 12, **options))
        for _ in range(3):
            batcher.step()
            batcher._batch.scheduler.check()
    batcher.run()
    assert is_free(batcher)
    return handles


def test_the_text_is_the_same_and_every_step_one_forward(model, monkeypatch, forwards):
    wanted = served_one_after_the_other(model, None)
    texts = [[*prompt, *one.token_ids] for prompt, one in zip(PROMPTS, wanted, strict=True)]
    draft_from(monkeypatch, texts, 5)
    forwards.clear()
    handles = served_one_after_the_other(model, SPECULATION)
    assert [one.token_ids for one in handles] == [one.token_ids for one in wanted]
    assert sum(one.stats.accepted_tokens for one in handles) > 20
    beside = [(counts, kept) for counts, kept in forwards if kept is not None]
    # The first row has four drafted tokens, the prompts beside it seven in all.
    assert ([5, 1], [0, 1, 2, 3, 4, 5]) in beside
    assert any(sum(counts) - len(kept) >= 5 for counts, kept in beside)


def test_a_prompt_that_fails_ends_alone(model, monkeypatch):
    wanted = ContinuousBatching(1, model).submit(PROMPTS[0], PARAMS[0], 30).result().token_ids
    draft_from(monkeypatch, [PROMPTS[0] + wanted], 4)
    prefill = StepRunner.prefill

    def poisoned(self, chunks, *rest, **more):
        if any(96 in chunk.tokens for chunk in chunks):
            raise RuntimeError("poison")
        return prefill(self, chunks, *rest, **more)

    monkeypatch.setattr(StepRunner, "prefill", poisoned)
    batcher = ContinuousBatching(4, model, speculation=SPECULATION)
    batcher._batch._runner.packs = True
    kept = batcher.submit(PROMPTS[0], PARAMS[0], 30)
    while kept.request.num_drafted == 0:
        batcher.step()
    bad, good = (batcher.submit(ids, PARAMS[0], 6) for ids in ([3, 96, 4], PROMPTS[2]))
    batcher.run()
    assert str(bad.error) == "poison"
    assert kept.token_ids == wanted
    assert len(good.token_ids) == 6
    assert is_free(batcher)
