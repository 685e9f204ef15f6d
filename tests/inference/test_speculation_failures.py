"""Drafts where something goes wrong, or somebody waits: the others go on as without a draft."""

from __future__ import annotations

import pytest
from batching import PAGE, PROMPTS, is_free
from drafting import SPECULATION, draft_from
from families import tiny_model

from llamatelemetry.inference import running_batch, verify
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.ngrams import NgramIndex
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.inference.speculation_config import SpeculationConfig
from llamatelemetry.inference.verify import Verifier

LONG = SpeculationConfig(num_speculative_tokens=15, prompt_lookup_min=1, adaptive=False)


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def raises(*_):
    raise RuntimeError("of one draw")


@pytest.mark.parametrize(("owner", "name"), [(verify, "draw"), (Verifier, "run")])
def test_what_fails_is_drawn_without_drafts(device, monkeypatch, owner, name):
    model, options = tiny_model("llama", device), LogitOptions(logprobs=1)
    plain = ContinuousBatching(2, model)
    wanted = [plain.submit(PROMPTS[0], GREEDY, 12, logits=one) for one in (None, options)]
    plain.run()
    draft_from(monkeypatch, [PROMPTS[0] + wanted[0].token_ids], 99)
    batcher = ContinuousBatching(2, model, speculation=SPECULATION)
    handles = [batcher.submit(PROMPTS[0], GREEDY, 12, logits=one) for one in (None, options)]
    batcher.step()
    with monkeypatch.context() as context:
        context.setattr(owner, name, raises)
        batcher.step()
    counts = [handle.stats.drafted_tokens for handle in handles]
    assert counts == ([4, 0] if owner is verify else [0, 0])  # those that were checked
    assert batcher.telemetry.summary()["drafted_tokens"] == sum(counts)
    batcher.run()
    assert [handle.token_ids for handle in handles] == [handle.token_ids for handle in wanted]
    assert all(handle.stats.accepted_tokens > 0 for handle in handles)
    assert is_free(batcher)


def test_nobody_gives_up_blocks_for_a_draft(device, monkeypatch):
    monkeypatch.setattr(NgramIndex, "propose", lambda self, tokens, count: [1] * count)
    model = tiny_model("llama", device)
    text = ContinuousBatching(1, model).submit([7, 8, 9], GREEDY, 30).result().token_ids
    preemptions, drafted = [], []
    for speculation in (None, LONG):
        batcher = ContinuousBatching(
            2, model, num_blocks=10, share_prefixes=False, speculation=speculation
        )
        batcher._batch.scheduler.expected_share = 0.0
        handles = [
            batcher.submit(PROMPTS[0], GREEDY, 30),
            batcher.submit([7, 8, 9], GREEDY, 30, stop_token_ids=[text[9]]),  # ends early
        ]
        while batcher.active_requests:
            batcher.step()
            batcher._batch.scheduler.check()
        assert is_free(batcher)
        preemptions += [handle.stats.preemptions for handle in handles]
        drafted.append(sum(handle.stats.drafted_tokens for handle in handles))
    assert preemptions == [0, 0, 0, 0]
    assert drafted[1] > 100


def test_who_comes_need_not_wait_for_drafts(device, monkeypatch):
    monkeypatch.setattr(NgramIndex, "propose", lambda self, tokens, count: [1] * count)
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(2, model, max_step_tokens=16, speculation=LONG)
    first = batcher.submit(PROMPTS[0], GREEDY, 60)
    while first.request.num_drafted == 0:
        batcher.step()
    second, steps = batcher.submit(PROMPTS[2][:16], GREEDY, 4), 0
    while not second.token_ids:
        batcher.step()
        steps += 1
    assert steps <= 2
    assert not first.done()
    batcher.run()
    assert is_free(batcher)


def test_drafts_share_what_the_budget_has_left(device, monkeypatch):
    monkeypatch.setattr(NgramIndex, "propose", lambda self, tokens, count: [1] * count)
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(4, model, max_step_tokens=13, speculation=LONG)
    handles = [batcher.submit(PROMPTS[0], GREEDY, 20) for _ in range(4)]
    while not any(handle.stats.drafted_tokens for handle in handles):
        batcher.step()
    assert [handle.stats.drafted_tokens for handle in handles] == [3, 2, 2, 2]
