"""Drafts of a model in a batch: the text is the target's, and right drafts are many from a twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batching import PAGE, PROMPTS, is_free
from drafting import SPECULATION, served, tokens_of
from families import tiny_model

from llamatelemetry.inference import model_drafts, running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.served import check_draft_model
from llamatelemetry.inference.speculation_config import SpeculationConfig
from llamatelemetry.models.opset import REFERENCE
from llamatelemetry.models.patching import ops_of, patch


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def models(device):
    """A target, a twin of it, and another of the same vocabulary."""
    with torch.inference_mode(False):
        target, twin, other = (tiny_model("llama", device) for _ in range(3))
        twin.load_state_dict(target.state_dict())
        other.lm_head.weight.data = other.lm_head.weight.flip(0).contiguous()
    return target, twin, other


def drafted_by(model, **options):
    return replace(SPECULATION, draft_model=model, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 14, "num_host_blocks": 40},
        {"overlap": True},
        {"max_step_tokens": 6},
    ],
)
def test_the_text_is_the_same(device, monkeypatch, options):
    monkeypatch.setattr(model_drafts, "_PREFILL_TOKENS", 10)
    target, twin, other = models(device)
    wanted, plain_steps, _ = served(target, None, **options)
    for model, adaptive in ((twin, False), (twin, True), (other, False)):
        config = drafted_by(model, adaptive=adaptive)
        handles, steps, _ = served(target, config, **options)
        assert tokens_of(handles) == tokens_of(wanted)
        stats = [handle.stats for handle in handles]
        drafted = sum(one.drafted_tokens for one in stats)
        right = sum(one.accepted_tokens for one in stats)
        if not adaptive:
            assert drafted > 40
            # The draft draws with the target's random bits.
            assert right > 0.9 * drafted if model is twin else right < 0.5 * drafted
            assert model is not twin or steps < 0.8 * plain_steps


def test_penalties_and_several_answers(device):
    target, twin, _ = models(device)
    params = [GREEDY, *(SamplingParams(temperature=1.2, seed=seed) for seed in range(2))]
    options = LogitOptions(frequency_penalty=0.7, logprobs=1)
    texts = []
    for config in (None, drafted_by(twin)):
        batcher = ContinuousBatching(4, target, speculation=config)
        group = batcher.submit_group(PROMPTS[2], params, 20)
        watched = batcher.submit(PROMPTS[0], GREEDY, 20, logits=options)
        batcher.run()
        texts.append([handle.token_ids for handle in (*group, watched)])
        assert is_free(batcher)
    assert texts[0] == texts[1]
    assert all(handle.stats.accepted_tokens > 5 for handle in group)


def test_a_draft_model_that_raises_costs_its_drafts_alone(device, monkeypatch, caplog):
    target, twin, _ = models(device)
    wanted = ContinuousBatching(1, target).submit(PROMPTS[0], GREEDY, 20).result().token_ids
    prefill = StepRunner.prefill

    def failing(self, *args, **kwargs):
        if self.model is twin:
            raise RuntimeError("of the draft")
        return prefill(self, *args, **kwargs)

    monkeypatch.setattr(StepRunner, "prefill", failing)
    batcher = ContinuousBatching(1, target, speculation=drafted_by(twin))
    handle = batcher.submit(PROMPTS[0], GREEDY, 20)
    assert handle.result().token_ids == wanted
    assert handle.stats.drafted_tokens == 0
    assert "the draft model raised: of the draft" in caplog.text
    assert is_free(batcher)


def test_refusals(device):
    target, _, _ = models(device)
    with pytest.raises(ValueError, match="draft_model must be a transformers model, got int"):
        ContinuousBatching(1, target, speculation=SpeculationConfig(draft_model=4))
    with torch.inference_mode(False):
        wider = tiny_model("llama", device)
        wider.resize_token_embeddings(128)
    with pytest.raises(ValueError, match="target's vocabulary of 97 tokens, got 128"):
        ContinuousBatching(1, target, speculation=SpeculationConfig(draft_model=wider))


def test_a_draft_model_has_the_target_s_backend(device):
    target, twin, _ = models(device)
    patch(target, ops=REFERENCE)
    check_draft_model(twin, target)
    assert ops_of(twin) is REFERENCE
