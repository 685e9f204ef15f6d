"""Steps that are launched before the tokens of the last one are looked at: the same text."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from batching import COUNTS, PAGE, PROMPTS, is_free
from engines import make_engine
from families import tiny_model

from llamatelemetry.inference import runner, running_batch, step
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.host_pages import HostPages
from llamatelemetry.inference.launched import Launched
from llamatelemetry.inference.plan_runner import PlanRunner
from llamatelemetry.inference.runner import DecodeStep, StepRunner
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.stream_order import StreamOrder


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def serve(model, seed, **options):
    """Tokens and reasons of requests that come, stop, are cancelled and are preempted at random."""
    rng = random.Random(seed)
    batcher = ContinuousBatching(3, model, **options)
    batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some are preempted
    handles = []
    for i in range(9):
        prompt = [rng.randrange(2, 90) for _ in range(rng.randrange(1, 30))]
        params = rng.choice([GREEDY, SamplingParams(temperature=1.2, seed=i)])
        handles.append(
            batcher.submit(
                prompt,
                params,
                rng.randrange(1, 20),
                stop_token_ids=rng.sample(range(96), 6),
                min_tokens=1 if i == 4 else 0,
            )
        )
        for _ in range(rng.randrange(4)):
            batcher.step()
            batcher._batch.scheduler.check()
    batcher.run()
    assert is_free(batcher)
    preempted = sum(handle.stats.preemptions for handle in handles)
    return [(h.token_ids, h.request.finish_reason) for h in handles], preempted


@pytest.mark.parametrize("options", [{}, {"num_blocks": 14}, {"max_step_tokens": 5}])
def test_the_text_is_the_same_with_and_without(device, options):
    model = tiny_model("llama", device)
    preempted, reasons = 0, set()
    for seed in range(3):
        (late, count), (wanted, _) = (
            serve(model, seed, overlap=overlap, **options) for overlap in (True, False)
        )
        assert late == wanted
        preempted += count
        reasons |= {reason for _, reason in late}
    assert reasons == {"stop", "length"}
    assert (preempted > 0) == ("num_blocks" in options)


def test_a_step_is_launched_before_the_last_one_s_tokens_are_seen(device, monkeypatch):
    batcher = ContinuousBatching(2, tiny_model("llama", device), overlap=True)
    order = []
    launch, results = PlanRunner.launch, Launched.results
    monkeypatch.setattr(
        PlanRunner, "launch", lambda *args: (order.append("launch"), launch(*args))[1]
    )
    monkeypatch.setattr(Launched, "results", lambda self: (order.append("seen"), results(self))[1])
    handle = batcher.submit(PROMPTS[0], max_tokens=4)
    batcher.step()
    assert handle.token_ids == []
    batcher.step()
    assert len(handle.token_ids) == 1
    batcher.run()
    # It is known that the fifth token would be one too many, so it is never launched.
    assert order == ["launch", *["launch", "seen"] * 3, "seen"]


def test_a_stop_seen_late_says_and_writes_nothing_more(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    params = SamplingParams(temperature=1.5, seed=3)
    plain = ContinuousBatching(2, engine, overlap=False)
    free = plain.submit("the cat", params, 20).result()
    options = {"stop_sequences": free.text[3:5]}
    wanted = plain.submit("the cat", params, 20, **options).result()
    late = ContinuousBatching(2, engine, overlap=True, num_blocks=16)
    neighbour = late.submit("on the mat", params, 40)
    for _ in range(3):  # each takes the blocks that the last one gave back
        handle = late.submit("the cat", params, 20, **options)
        pieces = list(handle)
        got = handle.result()
        assert (got.text, got.token_ids) == (wanted.text, wanted.token_ids)
        assert "".join(pieces) == wanted.text
        assert len(handle.token_ids) < 20
    assert neighbour.result().text == plain.submit("on the mat", params, 40).result().text
    assert is_free(late)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_of_another_stream_waits_for_the_one_before(monkeypatch, overlap):
    """As where two threads, each with a stream of its own, run the steps by turns."""
    order = []

    class Stream:
        def wait_stream(self, other):
            order.append((names[self], names[other]))

    streams = [Stream(), Stream()]
    names, turns = dict(zip(streams, "ab", strict=True)), itertools.cycle(streams)
    batcher = ContinuousBatching(2, tiny_model("llama"), overlap=overlap)
    batcher._batch._order = StreamOrder(torch.device("cuda", 0))
    launch, copies = PlanRunner.launch, HostPages.swap
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(turns))
    monkeypatch.setattr(
        PlanRunner, "launch", lambda *args: (order.append("launch"), launch(*args))[1]
    )
    monkeypatch.setattr(HostPages, "swap", lambda *args: (order.append("copies"), copies(*args))[1])
    batcher.submit(PROMPTS[0], max_tokens=3)
    batcher.run()
    launched = ["launch"] if overlap else []
    last = [("b", "a"), "copies"] if overlap else []
    wanted = ["copies", *launched, ("b", "a"), "copies", *launched, ("a", "b"), "copies", *launched]
    assert order == wanted + last


def test_what_is_dropped_is_kept_until_the_stream_has_read_it(monkeypatch):
    batcher = ContinuousBatching(2, tiny_model("llama"), overlap=True)
    batcher.submit(PROMPTS[0], max_tokens=5).result()
    one, kept = batcher._batch._runner.runner, []
    for module in (runner, step):
        monkeypatch.setattr(
            module, "keep_until_read", lambda tensors: kept.extend(map(id, tensors))
        )
    steps, rope = one.steps(), [id(table) for pair in one._rope for table in pair]
    assert steps
    assert rope
    one.ready(10 * one._num_positions, one.pages.num_blocks, keep=True)
    assert one.steps() == []
    assert {*rope, *(id(x) for old in steps for x in (old.input_ids, old.input.positions))} <= {
        *kept
    }
    source = torch.tensor([7])
    step.take_ids(torch.tensor([0, 0]), [1], [(source, 0)])
    assert kept[-1] == id(source)


def test_streams_that_read_are_recorded(monkeypatch):
    class OnGpu:
        is_cuda, device, streams = True, "cuda:0", ()

        def record_stream(self, stream):
            self.streams += (stream,)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    tensor = OnGpu()
    step.keep_until_read([torch.zeros(1), tensor])
    assert tensor.streams == ("of cuda:0",)


def test_a_cache_of_another_dtype_follows_the_stream_too(monkeypatch):
    calls, model = [], tiny_model("llama")

    class Order(StreamOrder):
        def __init__(self, device):
            calls.append("made")
            super().__init__(device)

        def follow(self):
            calls.append("followed")
            super().follow()

    monkeypatch.setattr(running_batch, "StreamOrder", Order)
    batcher = ContinuousBatching(2, model)
    batcher.submit(PROMPTS[0], max_tokens=5)
    batcher.step()
    calls.clear()
    model.double()
    batcher.step()
    assert calls == ["followed", "made", "followed"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_launch_that_fails_loses_nothing(tmp_path, device, monkeypatch, error):
    engine, _ = make_engine(tmp_path, device)
    params = SamplingParams(temperature=1.5, seed=3)
    batcher = ContinuousBatching(4, engine, overlap=True)
    wanted = [batcher.submit(p, params, 15).result().token_ids for p in PROMPTS]
    run, count = DecodeStep.run, iter(range(1000))

    def sometimes(self):
        found = run(self)
        if next(count) % 4 == 2:
            raise error("after the step has moved on")
        return found

    monkeypatch.setattr(DecodeStep, "run", sometimes)
    handles = [batcher.submit(p, params, 15) for p in PROMPTS]
    interrupts = 0
    while batcher.active_requests:
        try:
            batcher.run()
        except KeyboardInterrupt:
            interrupts += 1
    assert (interrupts > 1) == (error is KeyboardInterrupt)
    assert [handle.token_ids for handle in handles] == wanted
    assert is_free(batcher)


def test_logits_of_nan_end_their_request_alone(device, monkeypatch):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(4, model, overlap=True)
    wanted = [
        batcher.submit(p, max_tokens=n).result().token_ids
        for p, n in zip(PROMPTS, COUNTS, strict=True)
    ]
    prefill = StepRunner.prefill

    def damaged(self, chunks, width, **more):
        logits = prefill(self, chunks, width, **more)
        for row, chunk in enumerate(chunks):
            if 96 in chunk.tokens:
                logits[row] = torch.nan
        return logits

    monkeypatch.setattr(StepRunner, "prefill", damaged)
    handles = [batcher.submit(p, max_tokens=n) for p, n in zip(PROMPTS, COUNTS, strict=True)]
    bad = batcher.submit([3, 96, 4], max_tokens=8)
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        bad.result()
    assert bad.token_ids == []
    batcher.run()
    assert [handle.token_ids for handle in handles] == wanted
    assert is_free(batcher)


def test_a_model_whose_weights_are_nan_is_refused(device):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(2, model, overlap=True)
    handle = batcher.submit(PROMPTS[0], max_tokens=20)
    for _ in range(3):
        batcher.step()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        handle.result()
    assert is_free(batcher)
