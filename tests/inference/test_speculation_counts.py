"""What is counted of drafts, and what the counts lead to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from batching import PROMPTS
from drafting import SPECULATION, draft_from, served, texts_of
from families import tiny_model

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.draft_lengths import DraftLengths
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.sampling import GREEDY


def test_drafts_that_are_never_right_are_left_out(device, monkeypatch):
    model = tiny_model("llama", device)
    prompt, count = PROMPTS[0], 90
    wanted = ContinuousBatching(1, model).submit(prompt, GREEDY, count).result().token_ids
    draft_from(monkeypatch, [prompt + wanted], 1)
    monkeypatch.setattr(DraftLengths, "note_time", lambda *_: None)  # of a busy machine
    drafted = {}
    for config in (SPECULATION, replace(SPECULATION, adaptive=True)):
        handle = ContinuousBatching(1, model, speculation=config).submit(prompt, GREEDY, count)
        assert handle.result().token_ids == wanted
        drafted[config.adaptive] = handle.stats.drafted_tokens
        assert handle.stats.accepted_tokens == 0
    assert 0 < drafted[True] < drafted[False] / 4


def test_counts_of_steps_and_requests(device, monkeypatch):
    model = tiny_model("llama", device)
    wanted, _, _ = served(model, None)
    draft_from(monkeypatch, texts_of(wanted), 4)
    handles, _, batcher = served(model, SPECULATION)
    found, stats = batcher.telemetry.summary(), [handle.stats for handle in handles]
    assert found["accepted_tokens"] == sum(one.accepted_tokens for one in stats) > 0
    assert found["decode_tokens"] == sum(one.num_tokens - 1 for one in stats)
    assert found["requests"] == len(handles)


def test_a_right_draft_that_ends_the_text_is_right_and_counted_before_the_end(device, monkeypatch):
    model, prompt = tiny_model("llama", device), PROMPTS[0]
    wanted = ContinuousBatching(1, model).submit(prompt, GREEDY, 9).result().token_ids
    draft_from(monkeypatch, [prompt + wanted], 99)
    seen, end = [], RequestHandle.end
    monkeypatch.setattr(
        RequestHandle, "end", lambda self, error: (seen.append(self.stats), end(self, error))[1]
    )
    batcher = ContinuousBatching(1, model, speculation=SPECULATION)
    stop = wanted[wanted.index(wanted[2])]
    handle = batcher.submit(prompt, GREEDY, 9, stop_token_ids=[stop])
    count = len(handle.result().token_ids)
    assert count > 1
    for stats in (seen[0], handle.stats):
        assert (stats.drafted_tokens, stats.accepted_tokens) == (4, count - 1)
    assert batcher.telemetry.summary()["decode_tokens"] == count - 1


def test_steps_of_a_model_that_records_nothing_are_timed_with_drafts(device, monkeypatch):
    model, prompt = tiny_model("mixtral", device), PROMPTS[0]
    wanted = ContinuousBatching(1, model).submit(prompt, GREEDY, 60).result().token_ids
    draft_from(monkeypatch, [prompt + wanted], 99)
    timed, note_time = [], DraftLengths.note_time
    monkeypatch.setattr(
        DraftLengths, "note_time", lambda self, *args: (timed.append(args), note_time(self, *args))
    )
    batcher = ContinuousBatching(1, model, speculation=replace(SPECULATION, adaptive=True))
    assert batcher.submit(prompt, GREEDY, 60).result().token_ids == wanted
    assert batcher.decode_mode == "eager"
    assert any(drafted > 0 for _, drafted, _ in timed)


def test_the_server_counts_them_under_vllm_s_names(device, monkeypatch):
    pytest.importorskip("prometheus_client")
    from llamatelemetry.serving.metrics import Metrics

    model = tiny_model("llama", device)
    wanted = ContinuousBatching(1, model).submit(PROMPTS[0], GREEDY, 20).result().token_ids
    draft_from(monkeypatch, [PROMPTS[0] + wanted], 4)
    batcher = ContinuousBatching(1, model, speculation=SPECULATION)
    metrics = Metrics("tiny", lambda: 0, batcher.telemetry)
    stats = batcher.submit(PROMPTS[0], GREEDY, 20).result().stats
    counts = {}
    for line in metrics.text().decode().splitlines():
        if line.startswith("vllm:spec_decode") and "_created" not in line:
            counts[line.partition("{")[0]] = float(line.split()[-1])
    assert counts == {
        "vllm:spec_decode_num_draft_tokens_total": stats.drafted_tokens,
        "vllm:spec_decode_num_accepted_tokens_total": stats.accepted_tokens,
    }
    assert stats.accepted_tokens > 0
