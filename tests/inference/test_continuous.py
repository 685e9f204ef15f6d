"""Continuous batching: every request's text is its own, whoever comes, goes or fails beside it."""

from __future__ import annotations

import doctest
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from batching import COUNTS, PAGE, PROMPTS, WARM, alone, assert_text, is_free
from engines import make_engine
from families import tiny_model

from llamatelemetry.inference import continuous, running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.defaults import ModelDefaults
from llamatelemetry.inference.runner import DecodeStep
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.models.patching import patch
from llamatelemetry.profiling.metrics import summarise


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "phi3_partial", "glm4"])
def test_text_is_that_of_the_request_alone(device, family):
    model = tiny_model(family, device)
    patch(model)
    wanted = [alone(model, *pair) for pair in zip(PROMPTS, COUNTS, strict=True)]
    for options in (
        {"max_batch_size": 3},
        {"max_batch_size": 4, "max_step_tokens": 6},
        {"max_batch_size": 5, "num_blocks": 12},
        {"max_batch_size": 5, "num_blocks": 12, "num_host_blocks": 40, "share_prefixes": False},
        {"max_batch_size": 5, "share_prefixes": False},
    ):
        batcher = ContinuousBatching(engine=model, **options)
        batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some are preempted
        handles = []
        for prompt, count in zip(PROMPTS, COUNTS, strict=True):
            handles.append(batcher.submit(prompt, max_tokens=count))
            batcher.step()
        batcher.run()
        for prompt, handle, tokens in zip(PROMPTS, handles, wanted, strict=True):
            assert_text(model, prompt, handle.result().token_ids, tokens)
        preemptions = sum(handle.stats.preemptions for handle in handles)
        assert (preemptions > 0) == ("num_blocks" in options)
        assert is_free(batcher)


def test_engine_text_draws_and_the_recorded_step(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    texts = ["the cat", "on", "the mat the mat", "cat on cat"]
    wanted = [
        engine.infer(text, 20, temperature=1.5, top_p=0.9, top_k=40, seed=5) for text in texts
    ]
    params = SamplingParams(temperature=1.5, top_p=0.9, top_k=40, seed=5)
    batcher = ContinuousBatching(3, engine)
    handles = [batcher.submit(text, params, 20) for text in texts]
    streamed = ["".join(handle) for handle in handles]
    assert streamed == [handle.result().text for handle in handles]
    assert streamed == [result.text for result in wanted]
    mode = "graph" if device.type == "cuda" else "recorded"
    assert batcher._batch._runner.decode_mode == mode
    assert is_free(batcher)


def test_rows_are_loaded_when_they_change_and_not_else(tmp_path, device, monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", 64)
    engine, _ = make_engine(tmp_path, device)
    loads = []
    load = DecodeStep.load
    monkeypatch.setattr(
        DecodeStep, "load", lambda self, *args: (loads.append(len(args[1])), load(self, *args))[1]
    )
    batcher = ContinuousBatching(4, engine)
    first = batcher.submit([5, 9], max_tokens=30)
    second = batcher.submit([7], max_tokens=10)
    for _ in range(5):
        batcher.step()
    assert loads == [2]
    batcher.run()
    assert loads == [2, 1]
    assert (len(first.token_ids), len(second.token_ids)) == (30, 10)


def test_what_a_request_does_not_say_is_the_model_s(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    engine.defaults = ModelDefaults({"do_sample": True, "temperature": 1.5, "seed": 9})
    batcher = ContinuousBatching(2, engine)
    handles = [batcher.submit("the cat", max_tokens=20), batcher.submit("the cat", GREEDY, 20)]
    texts = [handle.result().text for handle in handles]
    assert texts[0] == "".join(engine.stream("the cat", max_tokens=20))
    assert texts[1] == "".join(engine.stream("the cat", GREEDY, max_tokens=20))
    assert texts[0] != texts[1]


def test_a_repetition_penalty_beside_others(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    params = [GREEDY, SamplingParams(temperature=0.0, repetition_penalty=1.8)]
    wanted = ["".join(engine.stream("the cat", one, max_tokens=20)) for one in params]
    batcher = ContinuousBatching(2, engine)
    handles = [batcher.submit("the cat", one, 20) for one in params]
    assert [handle.result().text for handle in handles] == wanted
    assert wanted[0] != wanted[1]


def test_ends(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    batcher = ContinuousBatching(4, engine)
    free = batcher.submit("the cat", WARM, 20).result()
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    stop = free.text[3:5]
    cut = batcher.submit("the cat", WARM, 20, stop_sequences=stop).result()
    assert (cut.finish_reason, cut.text) == ("stop", free.text[: free.text.index(stop)])
    token = free.token_ids[4]
    first = free.token_ids.index(token)
    ended = batcher.submit("the cat", WARM, 20, stop_token_ids=[token]).result()
    assert (ended.finish_reason, ended.token_ids) == ("stop", free.token_ids[: first + 1])
    greedy = batcher.submit("the cat", None, 20).result().token_ids
    end = greedy[4]
    late = batcher.submit("the cat", None, 20, stop_token_ids=[end], min_tokens=12).result()
    assert end not in late.token_ids[:12]
    assert late.token_ids[: greedy.index(end)] == greedy[: greedy.index(end)]
    assert len(late.token_ids) > 12
    (eos,) = engine.loaded.eos_ids
    batcher._served = replace(batcher._served, eos=(token,))
    assert batcher.submit("the cat", WARM, 20).result().token_ids == ended.token_ids
    kept = batcher.submit("the cat", WARM, 20, ignore_eos=True).result()
    assert kept.token_ids == free.token_ids
    assert eos != token


def test_threads_share_it(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    texts = ["the cat", "on", "the mat the mat", "cat on cat"] * 6
    wanted = {text: engine.infer(text, 12, 0.8, seed=5).text for text in set(texts)}
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=5)
    batcher = ContinuousBatching(3, engine)

    def one(pair):
        i, text = pair
        handle = batcher.submit(text, params, 12)
        if i % 5 == 4:
            handle.cancel()
            return None
        return "".join(handle) if i % 2 else handle.result().text

    with ThreadPoolExecutor(6) as pool:
        texts_of = list(pool.map(one, enumerate(texts)))
    for i, (text, got) in enumerate(zip(texts, texts_of, strict=True)):
        assert got == (None if i % 5 == 4 else wanted[text])
    batcher.run()
    assert is_free(batcher)


def test_times_and_counts(device):
    batcher = ContinuousBatching(1, tiny_model("llama", device))
    first = batcher.submit(PROMPTS[2], max_tokens=5)
    second = batcher.submit(PROMPTS[3], max_tokens=1)
    before = second.stats
    assert math.isnan(before.ttft)
    assert math.isnan(before.queue_delay)
    stats = [first.result().stats, second.result().stats]
    assert stats[0].cached_tokens == 0
    assert stats[1].cached_tokens == 20  # of the 20 tokens that both begin with, in pages of 4
    assert stats[1].num_prompt_tokens == 1
    assert stats[1].queue_delay > stats[0].tpot * 4  # it waited for the first one's end
    assert [s.num_tokens for s in stats] == [5, 1]
    assert stats[0].enqueued <= stats[0].started <= stats[0].first_token <= stats[0].last_token
    assert summarise(stats)["ttft"]["p99"] >= stats[1].ttft * 0.99
    with pytest.raises(TimeoutError, match=r"must end within 0\.0 s"):
        batcher.submit([1], max_tokens=2).result(timeout=0.0)


def test_priorities(device):
    batcher = ContinuousBatching(1, tiny_model("llama", device))
    handles = [batcher.submit([7], max_tokens=3, priority=p) for p in (1, 0, 1, -1)]
    batcher.run()
    started = sorted(range(4), key=lambda i: handles[i].stats.started)
    assert started == [3, 1, 0, 2]


@pytest.mark.parametrize(
    "options", [{}, {"max_step_tokens": PAGE * 2, "share_prefixes": False}], ids=["cached", "cut"]
)
def test_several_answers_to_a_prompt_of_which_one_token_is_left(device, options):
    model, prompt = tiny_model("llama", device), PROMPTS[2][: PAGE * 2 + 1]
    batcher = ContinuousBatching(4, model, **options)
    wanted = batcher.submit(prompt, GREEDY, 5).result().token_ids
    handles = batcher.submit_group(prompt, [GREEDY, WARM], 5)  # all but the last token is there
    for _ in range(10):
        batcher.step()
        batcher._batch.scheduler.check()
    assert [len(handle.token_ids) for handle in handles] == [5, 5]
    assert handles[0].token_ids == wanted
    assert is_free(batcher)


def test_examples():
    found = doctest.testmod(continuous)
    assert (found.failed, found.attempted) == (0, 2)
