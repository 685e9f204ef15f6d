"""What a batch tells of its steps and requests: as objects, as a trace, and while it runs."""

from __future__ import annotations

import io
import itertools
import json
import math
import threading
import time

import pytest
from batching import PAGE, PROMPTS
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching


@pytest.fixture
def batcher(device, monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)
    return ContinuousBatching(3, tiny_model("llama", device), num_blocks=14, max_step_tokens=16)


def test_steps_and_requests_add_up(batcher):
    batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some are preempted
    heard = []
    batcher.telemetry.listeners.append(heard.append)
    handles = [batcher.submit(prompt, max_tokens=20) for prompt in PROMPTS]
    batcher.run()
    steps, ended = batcher.telemetry.steps, batcher.telemetry.requests
    # Where steps overlap, what is open after one is told anew once its tokens were looked at.
    assert [told.begin for told in heard] == [step.begin for step in steps]
    assert {one.number: one.stats for one in ended} == {h.request.arrival: h.stats for h in handles}
    assert all(one.reason == "length" for one in ended)
    again = sum(step.prompt_tokens for step in steps) - sum(map(len, PROMPTS))
    assert again >= -sum(one.stats.cached_tokens for one in ended)
    drawn = sum(one.stats.num_tokens for one in ended)
    preemptions = sum(step.preemptions for step in steps)
    assert preemptions == sum(one.stats.preemptions for one in ended) > 0
    # Each request's first token, and the first after a preemption, is drawn after a prefill.
    assert drawn - len(ended) - preemptions <= sum(step.decode_tokens for step in steps) < drawn
    assert all(0 <= step.cache_usage <= 1 and step.seconds > 0 for step in steps)
    assert max(step.running for step in steps) == 3
    assert steps[-1].running == steps[-1].waiting == steps[-1].used_blocks == 0
    found = batcher.telemetry.summary()
    assert (found["requests"], found["preemptions"]) == (len(PROMPTS), preemptions)
    assert found["ttft"]["p50"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert batcher.telemetry.summary(last_s=0.0)["steps"] == 0


def test_what_is_open_is_told_where_steps_overlap(device):
    batcher = ContinuousBatching(4, tiny_model("llama", device), overlap=True)
    batcher.submit([1, 2, 3], max_tokens=3)
    assert batcher.telemetry.summary()["waiting"] == 1
    batcher.run()
    found, last = batcher.telemetry.summary(), batcher.telemetry.steps[-1]
    assert (found["running"], found["waiting"], found["cache_usage"]) == (0, 0, 0.0)
    assert last.running == last.used_blocks == 0


def test_what_is_cancelled_between_steps_is_open_no_more(batcher):
    handle = batcher.submit([1, 2, 3], max_tokens=5)
    batcher.step()
    found = batcher.telemetry.summary()
    assert found["running"] == 1
    assert found["cache_usage"] > 0
    handle.cancel()
    assert batcher.telemetry.summary()["running"] == batcher.telemetry.steps[-1].running == 0


def test_requests_that_never_began_grow_old_too(batcher):
    batcher.submit([1, 2], max_tokens=5).cancel()
    assert batcher.telemetry.summary(last_s=60.0)["requests"] == 1
    time.sleep(0.02)
    assert batcher.telemetry.summary(last_s=0.01)["requests"] == 0


def test_a_cancelled_request_is_remembered(batcher):
    handle = batcher.submit([1, 2], max_tokens=5)
    handle.cancel()
    (ended,) = batcher.telemetry.requests
    assert ended.reason == "cancelled"
    assert math.isnan(ended.stats.started)
    assert math.isnan(batcher.telemetry.summary()["ttft"]["p50"])


def test_the_trace_is_what_perfetto_reads(batcher, tmp_path):
    for prompt in PROMPTS:
        batcher.submit(prompt, max_tokens=4)
    batcher.run()
    batcher.submit([1], max_tokens=4).cancel()
    path = tmp_path / "trace.json"
    batcher.telemetry.save_trace(path)
    events = json.loads(path.read_text())["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert len(steps) == len(batcher.telemetry.steps)
    assert {e["name"] for e in steps} <= {"prefill", "decode", "prefill+decode"}
    for before, after in itertools.pairwise(steps):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.2
    rows = [e for e in events if e["ph"] == "X" and e["pid"] == 2]
    assert {e["name"] for e in rows} == {"queue", "prefill", "decode"}
    assert len({e["tid"] for e in rows}) == len(PROMPTS)
    for e in events:
        assert e["ph"] in "XCM"
        assert e.get("dur", 0) >= 0


def test_the_live_view_shows_what_happens(batcher):
    console = pytest.importorskip("rich.console")
    from llamatelemetry.inference.live_view import live

    out = io.StringIO()
    drawn = console.Console(file=out, force_terminal=True, width=80)
    with live(batcher.telemetry, drawn, per_second=50):
        batcher.submit(PROMPTS[0], max_tokens=8)
        batcher.run()
    shown = out.getvalue()
    for word in ("running, waiting", "TTFT p50, p95", "tok/s", "preemptions"):
        assert word in shown


def test_it_is_read_while_threads_step(batcher):
    stop = threading.Event()

    def read():
        while not stop.is_set():
            batcher.telemetry.summary(1.0)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(3):
            for prompt in PROMPTS:
                batcher.submit(prompt, max_tokens=6)
            batcher.run()
    finally:
        stop.set()
        reader.join()
    assert len(batcher.telemetry.requests) == 3 * len(PROMPTS)
