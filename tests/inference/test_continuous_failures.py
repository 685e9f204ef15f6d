"""Continuous batching where something goes wrong: the others' texts stay, and it stays usable."""

from __future__ import annotations

from collections import deque
from concurrent.futures import CancelledError

import pytest
import torch
from batching import COUNTS, PAGE, PROMPTS, WARM, alone, assert_text, is_free
from engines import make_engine
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.block_manager import NeverFits, OutOfBlocks
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.runner import DecodeStep, StepRunner
from llamatelemetry.models.patching import patch


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def test_a_request_that_fails_ends_alone(device, monkeypatch):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(4, model)
    wanted = [alone(model, *pair) for pair in zip(PROMPTS, COUNTS, strict=True)]
    prefill = StepRunner.prefill

    def poisoned(self, chunks, width, **more):
        if any(96 in chunk.tokens for chunk in chunks):
            raise RuntimeError("poison")
        return prefill(self, chunks, width, **more)

    monkeypatch.setattr(StepRunner, "prefill", poisoned)
    handles = [batcher.submit(p, max_tokens=n) for p, n in zip(PROMPTS, COUNTS, strict=True)]
    batcher.step()
    bad = batcher.submit([3, 96, 4], max_tokens=8)
    with pytest.raises(RuntimeError, match="poison"):
        bad.result()
    with pytest.raises(RuntimeError, match="poison"):
        list(bad.tokens())
    assert bad.done()
    for prompt, handle, tokens in zip(PROMPTS, handles, wanted, strict=True):
        assert_text(model, prompt, handle.result().token_ids, tokens)
    assert is_free(batcher)


def test_what_load_model_returned_is_no_engine(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    with pytest.raises(ValueError, match=r"ContinuousBatching: engine must .* loaded\.model"):
        ContinuousBatching(4, engine.loaded)


def test_a_decode_step_that_fails_is_run_again_one_by_one(tmp_path, device, monkeypatch):
    engine, _ = make_engine(tmp_path, device)
    batcher = ContinuousBatching(4, engine)
    wanted = [batcher.submit(p, WARM, 15).result().token_ids for p in PROMPTS]
    run, count = DecodeStep.run, iter(range(1000))

    def sometimes(self):
        if next(count) % 4 == 2:
            run(self)
            raise RuntimeError("after the step has moved on")
        return run(self)

    monkeypatch.setattr(DecodeStep, "run", sometimes)
    handles = [batcher.submit(p, WARM, 15) for p in PROMPTS]
    batcher.run()
    assert [handle.token_ids for handle in handles] == wanted
    assert is_free(batcher)


def test_an_interrupt_loses_nothing(tmp_path, device, monkeypatch):
    engine, _ = make_engine(tmp_path, device)
    batcher = ContinuousBatching(4, engine)
    wanted = [batcher.submit(p, WARM, 15).result().token_ids for p in PROMPTS]
    run, count = DecodeStep.run, iter(range(1000))

    def sometimes(self):
        found = run(self)
        if next(count) % 5 == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(DecodeStep, "run", sometimes)
    handles = [batcher.submit(p, WARM, 15) for p in PROMPTS]
    interrupts = 0
    while batcher.active_requests:
        try:
            batcher.run()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts > 1
    assert [handle.token_ids for handle in handles] == wanted


def test_a_text_that_fails_ends_its_request(tmp_path):
    engine, _ = make_engine(tmp_path, torch.device("cpu"))
    batcher = ContinuousBatching(4, engine)
    good, bad = batcher.submit("the cat", max_tokens=5), batcher.submit("on", max_tokens=5)

    def push(token):
        raise OverflowError("no such text")

    bad.request.text.push = push
    with pytest.raises(OverflowError, match="no such text"):
        bad.result()
    assert len(good.result().token_ids) == 5
    assert is_free(batcher)


def test_out_of_blocks_is_named_and_leaves_it_usable(device, monkeypatch):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(2, model, num_blocks=4)
    with pytest.raises(NeverFits, match="need 5 blocks of 4 tokens, the whole cache has 4"):
        batcher.submit([1] * 10, max_tokens=7)
    assert len(batcher.submit([1] * 10, max_tokens=6).result().token_ids) == 6

    batcher = ContinuousBatching(2, model)
    assert len(batcher.submit([1] * 10, max_tokens=6).result().token_ids) == 6
    ready = StepRunner.ready

    def limited(self, positions, blocks, *, keep):
        if blocks > 8:
            raise RuntimeError("can't allocate memory")
        return ready(self, positions, blocks, keep=keep)

    monkeypatch.setattr(StepRunner, "ready", limited)
    small = [batcher.submit([n] * 10, max_tokens=16) for n in range(3)]
    large = batcher.submit([1] * 40, max_tokens=6)
    with pytest.raises(OutOfBlocks, match=r"it cannot grow: can't allocate memory"):
        large.result()
    for n, handle in enumerate(small):
        assert_text(model, [n] * 10, handle.result().token_ids, alone(model, [n] * 10, 16))
    assert batcher._batch.scheduler.blocks.num_blocks <= 8
    assert is_free(batcher)


def test_cancel(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    batcher = ContinuousBatching(2, engine)
    handles = [batcher.submit("the cat", WARM, 30) for _ in range(4)]
    assert batcher.active_requests == handles
    assert handles[3].cancel()  # before it is known to anybody
    batcher.step()
    assert handles[2].cancel()  # while it waits
    pieces = []
    for piece in handles[0]:
        pieces.append(piece)
        handles[0].cancel()  # while it runs; what it has said stays
    assert 1 <= len(pieces) <= 2
    assert batcher.active_requests == [handles[1]]
    for handle in (handles[0], handles[2], handles[3]):
        assert handle.cancelled()
        assert not handle.cancel()
        with pytest.raises(CancelledError):
            handle.result()
    assert handles[1].result().text == engine.infer("the cat", 30, 1.5, 1.0, 0, 3).text
    assert is_free(batcher)


def test_a_request_that_ends_while_it_is_submitted_stops_no_other(device):
    batcher = ContinuousBatching(2, tiny_model("llama", device))
    other = batcher.submit(PROMPTS[0], max_tokens=4)
    batch = batcher._batch

    class Late(deque):
        def append(self, handle):
            handle.cancel()  # as another thread's sweep between submit's two lines
            super().append(handle)

    batch.incoming = Late(batch.incoming)
    late = batcher.submit(PROMPTS[1], max_tokens=4)
    assert late.cancelled()
    assert len(other.result().token_ids) == 4
    assert is_free(batcher)


def test_a_model_that_moves_goes_on_with_another_cache(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    batcher = ContinuousBatching(2, engine)
    handles = [batcher.submit(prompt, max_tokens=10) for prompt in PROMPTS[:3]]
    for _ in range(3):
        batcher.step()
    engine.loaded.model.bfloat16()
    batcher.run()
    assert [len(handle.result().token_ids) for handle in handles] == [10] * 3
    assert [handle.stats.preemptions for handle in handles] == [1, 1, 0]
    assert batcher._batch._runner.runner.pages.dtype == torch.bfloat16
    assert is_free(batcher)


def test_other_weights_share_no_prefix(device):
    model, other = tiny_model("llama", device), tiny_model("llama", device)
    batcher = ContinuousBatching(2, model)
    prompt = PROMPTS[2]
    batcher.submit(prompt, max_tokens=3).result()
    assert batcher.submit(prompt, max_tokens=3).result().stats.cached_tokens == 24
    with torch.inference_mode(False):
        model.load_state_dict(other.state_dict(), assign=True)
    from llamatelemetry.models.patching import unpatch

    unpatch(model)
    patch(model)
    assert batcher.submit(prompt, max_tokens=3).result().stats.cached_tokens == 0
    batcher.forget_prefixes()
    assert batcher.submit(prompt, max_tokens=3).result().stats.cached_tokens == 0


def test_refusals(tmp_path):
    for options, sentence in [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"max_batch_size": 1.5}, "max_batch_size must be a whole number, got 1.5"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=f"ContinuousBatching: {sentence}"):
            ContinuousBatching(**options)
    without = ContinuousBatching()
    assert (without.max_batch_size, without.active_requests) == (8, [])
    assert without.run() == without.step() == []
    with pytest.raises(ValueError, match="engine must be given to submit a request"):
        without.submit("the cat")
    model = ContinuousBatching(engine=tiny_model("llama"))
    for options, sentence in [
        ({"prompt": "the cat"}, "prompt must be token ids where engine is a model, got text"),
        ({"stop_sequences": "a"}, "stop_sequences: an engine with a tokenizer must be given"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            model.submit(**({"prompt": [1], "max_tokens": 4} | options))
    hooked = tiny_model("llama")
    hooked.model.layers[0].register_forward_hook(lambda module, args, output: None)
    sentence = "must be one that packed steps serve, got LlamaForCausalLM: .*hooks"
    with pytest.warns(UserWarning, match="patch: "), pytest.raises(ValueError, match=sentence):
        ContinuousBatching(engine=hooked)
    with pytest.raises(ValueError, match="needs an engine with a tokenizer"):
        iter(model.submit([1], max_tokens=4))
    engine, _ = make_engine(tmp_path, torch.device("cpu"))
    batcher = ContinuousBatching(engine=engine)
    for options, sentence in [
        ({"prompt": []}, "prompt must hold at least one token"),
        ({"prompt": None}, "prompt must be text or a sequence of token ids, got None"),
        ({"prompt": [10**6]}, r"prompt: a token id: token ids must lie in \[0, \d+\), got 1000000"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 63}, r"must fit the model's context of 64 tokens, got \d \+ 63"),
        (
            {"min_tokens": 5, "max_tokens": 4},
            r"min_tokens must lie in \[0, max_tokens = 4\], got 5",
        ),
        ({"params": {}}, "params must be SamplingParams or None, got {}"),
        ({"stop_sequences": ""}, "stop_sequences must not hold an empty string"),
        ({"stop_token_ids": "ab"}, "stop_token_ids must be token ids, got 'ab'"),
        ({"stop_token_ids": 5}, "stop_token_ids must be token ids, got 5"),
        ({"priority": "high"}, "priority must be a whole number, got 'high'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            batcher.submit(**({"prompt": "the cat", "max_tokens": 8} | options))
    assert batcher.active_requests == []
