"""Ctrl-C, wherever in the books of a batch it comes: no request is lost, and no text is another."""

from __future__ import annotations

import random
import signal
import sys
import threading

import pytest
from batching import PAGE, PROMPTS, WARM, alone, is_free
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.interrupts import as_one, uninterrupted
from llamatelemetry.inference.running_batch import RunningBatch
from llamatelemetry.inference.sampling import SamplingParams
from llamatelemetry.inference.scheduler import Scheduler

BOOKS = (
    *("running_batch.py", "scheduler.py", "block_manager.py", "host_blocks.py", "launched.py"),
    *("request_handle.py", "scheduled_request.py", "turns.py", "cache_room.py"),
)


@pytest.fixture(autouse=True)
def python_handler():
    """A shell's job in the background starts with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupts:
    """Sends one to this process after so many lines of the books."""

    def __init__(self, lines):
        self.left = lines

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.endswith(BOOKS):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self.trace


def served(model, overlap, lines):
    """Tokens of requests that share prompts and give their blocks up, how often they were
    interrupted, and what is left of the lines."""
    batcher = ContinuousBatching(3, model, overlap=overlap, num_blocks=9, num_host_blocks=4)
    batcher._batch.scheduler.expected_share = 0.0  # overcommits
    handles, count = [], 0
    params = [SamplingParams(temperature=1.2, seed=seed) for seed in range(2)]
    with Interrupts(lines) as interrupts:
        for prompt, length in zip(PROMPTS[:2], (5, 6), strict=True):
            try:
                handles += batcher.submit_group(prompt, params, length)
            except KeyboardInterrupt:
                count += 1
                handles = batcher.active_requests  # those that were submitted
        while batcher.active_requests:
            try:
                batcher.run()
            except KeyboardInterrupt:
                count += 1
    assert is_free(batcher)
    return [tuple(handle.token_ids) for handle in handles], count, interrupts.left


@pytest.mark.parametrize("overlap", [False, True])
def test_no_request_is_lost_wherever_it_comes(monkeypatch, overlap):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)
    model = tiny_model("llama")
    wanted, count, left = served(model, overlap, 0)
    assert count == 0
    assert len(wanted) == 4
    rng = random.Random(overlap)
    for line in rng.sample(range(1, -left), 12):
        texts, count, _ = served(model, overlap, line)
        assert count == 1
        assert set(texts) <= set(wanted)  # a submission may have been interrupted
        assert len(texts) in (2, 4)


def test_one_whose_token_is_ahead_gave_its_blocks_up_before_it(monkeypatch):
    """It may be admitted again at once, and is to have that token first."""
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)
    model, prompts = tiny_model("llama"), [[5, 9, 2], [7, 8], [11, 3, 8, 1]]
    batcher = ContinuousBatching(3, model, overlap=True, num_blocks=12, share_prefixes=False)
    batcher._batch.scheduler.expected_share = 0.0
    handles = [batcher.submit(prompt, WARM, 20) for prompt in prompts]
    planned, lost = RunningBatch._planned, []

    def interrupted(self):
        plan = planned(self)
        lost.extend(one for one in plan.preempted if one.num_ahead)
        if lost:
            raise KeyboardInterrupt
        return plan

    monkeypatch.setattr(RunningBatch, "_planned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batcher.run()
    monkeypatch.undo()
    next(handle for handle in handles if handle.request not in lost).cancel()  # room for it
    batcher.run()
    for handle, prompt in zip(handles, prompts, strict=True):
        if handle.request in lost:
            assert handle.token_ids == alone(model, prompt, 20, WARM)


def test_a_wider_window_is_followed_before_it(monkeypatch):
    model = tiny_model("mistral")
    batcher = ContinuousBatching(2, model, overlap=True)
    handle = batcher.submit(PROMPTS[4], WARM, 30)
    while len(handle.token_ids) < 10:
        batcher.step()
    compute_anew = Scheduler.compute_anew
    monkeypatch.setattr(running_batch, "window_of", lambda model: None)
    with monkeypatch.context() as patch:
        patch.setattr(
            Scheduler,
            "compute_anew",
            lambda self: (compute_anew(self), signal.raise_signal(signal.SIGINT)),
        )
        with pytest.raises(KeyboardInterrupt):
            batcher.run()
    batcher.run()
    assert handle.token_ids == alone(model, PROMPTS[4], 30, WARM)


def test_within_another_it_sets_no_handler(monkeypatch):
    handlers, put = [], signal.signal
    monkeypatch.setattr(signal, "signal", lambda *args: (handlers.append(args), put(*args))[1])
    inner = as_one(lambda: len(handlers))
    outer = as_one(lambda: [inner() for _ in range(3)])
    assert outer() == [1, 1, 1]
    assert len(handlers) == 2


def test_a_step_sets_one_handler(monkeypatch):
    batcher = ContinuousBatching(1, tiny_model("llama"))
    handle = batcher.submit(PROMPTS[0], max_tokens=4)
    batcher.step()
    handlers, put = [], signal.signal
    monkeypatch.setattr(signal, "signal", lambda *args: (handlers.append(args), put(*args))[1])
    batcher.step()
    assert len(handlers) == 2  # and puts the one before it back
    handle.result()


def test_it_is_raised_at_the_end_and_handlers_stay_as_they_were():
    before, order = signal.getsignal(signal.SIGINT), []

    def interrupted():
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                order.append("inner")
            order.append("outer")
        order.append("after")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert order == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is before
    others = []
    thread = threading.Thread(target=lambda: others.append(uninterrupted().__enter__()))
    thread.start()
    thread.join()
    assert others == [None]
