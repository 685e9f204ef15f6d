"""Models whose every layer has a sliding window give the blocks behind it back."""

from __future__ import annotations

import pytest
import torch
from batching import PAGE, PROMPTS, WARM, alone, assert_text, is_free
from families import WINDOW, tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.window import window_of


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def poison_free(batcher):
    """Puts NaN where nobody's keys are."""
    batch = batcher._batch
    free = batch.scheduler.blocks._free
    for layer in batch._runner.runner.pages.layers:
        for pages in layer:
            pages[torch.tensor(free, dtype=torch.int64, device=pages.device)] = torch.nan


@pytest.mark.parametrize("overlap", [False, True])
def test_blocks_behind_the_window_are_free_and_the_text_is_the_same(device, overlap):
    model = tiny_model("mistral", device)
    batcher = ContinuousBatching(3, model, overlap=overlap, share_prefixes=False)
    prompts = [*PROMPTS[2:], PROMPTS[0]]
    handles = [batcher.submit(prompt, WARM, 40) for prompt in prompts]
    assert window_of(model) == WINDOW
    most = 0
    while batcher.active_requests:
        batcher.step()
        scheduler = batcher._batch.scheduler
        scheduler.check()
        poison_free(batcher)
        for one in scheduler.running:
            if one.num_drawn > 4 * PAGE:
                held = len(one.table) - scheduler.blocks.num_hidden(one.name)
                most = max(most, held)
    assert 0 < most <= -(-WINDOW // PAGE) + 2  # as has_room counts
    for prompt, handle in zip(prompts, handles, strict=True):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, 40, WARM))
    assert is_free(batcher)


def test_more_requests_are_at_work_at_once(monkeypatch):
    """Each needs 16 blocks for all its tokens, and 5 at a time."""
    model = tiny_model("mistral")
    prompts = [[5 + i, 9] for i in range(4)]
    batcher = ContinuousBatching(4, model, num_blocks=40, share_prefixes=False)
    handles = [batcher.submit(prompt, WARM, 62) for prompt in prompts]
    batcher.step()
    assert len(batcher._batch.scheduler.running) == 4
    batcher.run()
    assert sum(handle.stats.preemptions for handle in handles) == 0
    for prompt, handle in zip(prompts, handles, strict=True):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, 62, WARM))


def test_those_that_wait_are_admitted_once_a_prompt_gave_blocks_back():
    """A prompt of ten blocks keeps five of them: with two at work a third one waits no longer."""
    batcher = ContinuousBatching(4, tiny_model("mistral"), num_blocks=20, share_prefixes=False)
    for _ in range(3):
        batcher.submit(list(range(3, 43)), max_tokens=30)
    running = batcher._batch.scheduler.running
    batcher.step()
    assert len(running) == 1
    while len(running) < 3 and batcher.active_requests:
        batcher.step()
    assert len(running) == 3  # before any ended
    batcher.run()
    assert is_free(batcher)


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_and_swapped_requests_give_the_same(device, overlap):
    model = tiny_model("mistral", device)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[4], [9, 8]]
    batcher = ContinuousBatching(4, model, num_blocks=9, num_host_blocks=6, overlap=overlap)
    batcher._batch.scheduler.expected_share = 0.0
    handles = [batcher.submit(prompt, WARM, 25) for prompt in prompts]
    while batcher.active_requests:
        batcher.step()
        batcher._batch.scheduler.check()
        poison_free(batcher)
    assert sum(handle.stats.preemptions for handle in handles)
    for prompt, handle in zip(prompts, handles, strict=True):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, 25, WARM))
    assert is_free(batcher)


def test_a_window_that_grows_has_everything_computed_anew(monkeypatch):
    model = tiny_model("mistral")
    batcher = ContinuousBatching(2, model)
    handle = batcher.submit(PROMPTS[4], WARM, 40)
    while len(handle.token_ids) < 20:
        batcher.step()
    for window, preemptions in ((WINDOW - 1, 0), (WINDOW, 1), (None, 2), (WINDOW, 2)):
        monkeypatch.setattr(running_batch, "window_of", lambda model, window=window: window)
        batcher.step()
        assert batcher._batch.scheduler.window == window
        assert handle.stats.preemptions == preemptions
    batcher.run()
    assert_text(model, PROMPTS[4], handle.token_ids, alone(model, PROMPTS[4], 40, WARM))


@pytest.mark.parametrize("family", ["gemma3", "llama", "mistral_full"])
def test_layers_that_look_at_all_keep_all(family):
    model = tiny_model(family)
    batcher = ContinuousBatching(2, model)
    handle = batcher.submit(PROMPTS[0], max_tokens=40)
    while len(handle.token_ids) < 30:
        batcher.step()
    assert window_of(model) is None
    blocks = batcher._batch.scheduler.blocks
    assert all(blocks.num_hidden(name) == 0 for name in blocks.sequences())
