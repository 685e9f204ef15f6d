"""Decode steps while nobody comes or goes: replays, and nothing else that costs anything."""

from __future__ import annotations

import pytest
import torch
from batching import COUNTS, PAGE, PROMPTS, alone, assert_text, is_free
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.runner import DecodeStep


def test_another_block_for_a_row_is_no_reason_to_load_all(device, monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)
    model, loads = tiny_model("llama", device), []
    load = DecodeStep.load
    monkeypatch.setattr(
        DecodeStep, "load", lambda self, *args: (loads.append(len(args[1])), load(self, *args))[1]
    )
    for overlap in (False, True):
        loads.clear()
        batcher = ContinuousBatching(4, model, overlap=overlap)
        handles = [batcher.submit(p, max_tokens=30) for p in PROMPTS[:2]]
        batcher.run()
        assert loads == [2]
        for prompt, handle in zip(PROMPTS, handles, strict=False):
            assert_text(model, prompt, handle.token_ids, alone(model, prompt, 30))
        assert is_free(batcher)


@pytest.mark.parametrize("overlap", [False, True])
def test_blocks_are_asked_for_where_one_is_full_and_not_with_every_token(monkeypatch, overlap):
    model, asked = tiny_model("llama"), []
    reserve = BlockManager.reserve
    monkeypatch.setattr(
        BlockManager, "reserve", lambda self, *args: (asked.append(args), reserve(self, *args))[1]
    )
    batcher = ContinuousBatching(3, model, overlap=overlap)
    handles = [batcher.submit([i + 2, 7], max_tokens=90, ignore_eos=True) for i in range(3)]
    batcher.run()
    assert [len(handle.token_ids) for handle in handles] == [90] * 3
    # Each fills one block of 64: for the next one, for tokens that it has drawn, and for those that
    # were ahead when it asked.
    assert len(asked) <= 3 * 3
    assert is_free(batcher)


def test_two_models_in_one_process_do_not_know_of_each_other(device):
    models = [tiny_model(family, device) for family in ("llama", "qwen3")]
    batchers = [ContinuousBatching(3, model, overlap=True) for model in models]
    wanted = [
        [alone(model, *pair) for pair in zip(PROMPTS, COUNTS, strict=True)] for model in models
    ]
    handles = [
        [batcher.submit(p, max_tokens=n) for p, n in zip(PROMPTS, COUNTS, strict=True)]
        for batcher in batchers
    ]
    while any(batcher.active_requests for batcher in batchers):
        for batcher in batchers:
            batcher.step()
    for model, own, texts in zip(models, handles, wanted, strict=True):
        for prompt, handle, tokens in zip(PROMPTS, own, texts, strict=True):
            assert_text(model, prompt, handle.token_ids, tokens)


def _long_model():
    model = tiny_model("llama", "cuda", torch.bfloat16)
    model.config.max_position_embeddings = 2048
    return model


@pytest.mark.gpu
def test_a_thousand_tokens_without_an_allocation_or_a_wait():
    batcher = ContinuousBatching(4, _long_model())
    handles = [batcher.submit(prompt, max_tokens=1100) for prompt in PROMPTS[:3]]
    for _ in range(10):
        batcher.step()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(1000):
            batcher.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert [len(handle.token_ids) for handle in handles] == [1009] * 3
    assert batcher.decode_mode == "graph"
    batcher.run()
    assert is_free(batcher)


@pytest.mark.gpu
def test_the_graphs_of_all_sizes_share_one_pool():
    def pools():
        return {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}

    before = pools()
    batcher = ContinuousBatching(20, _long_model())
    for count in (20, 9, 5, 3, 2, 1):
        for i in range(count):
            batcher.submit([i + 2], max_tokens=4)
        batcher.run()
    steps = batcher._batch._runner.runner.steps()
    assert [(len(step.input_ids), step.mode) for step in steps] == [
        (rows, "graph") for rows in (24, 16, 8, 4, 2, 1)
    ]
    assert len(pools() - before) == 1


@pytest.mark.gpu
def test_a_graph_whose_first_run_draws_token_0_is_not_nan():
    """Its logits' memory was captured, and not written yet."""
    model = tiny_model("llama", "cuda")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits alike: the first token
    batcher = ContinuousBatching(1, model)
    torch.full((1 << 20,), torch.nan, device="cuda")  # freed, as captures may find it
    assert batcher.submit([5, 9], max_tokens=4).result().token_ids == [0] * 4
