"""Penalties, biases, log-probabilities and groups of answers, against logits worked out alone."""

from __future__ import annotations

import math
import time

import pytest
import torch
from batching import PAGE, WARM, assert_text, is_free
from engines import make_engine
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.sampling import GREEDY, SamplingParams

PROMPT = [5, 9, 2]


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def greedy(model, prompt, count, change=lambda row, drawn: row):
    """Tokens of a greedy loop without any cache, whose logits change shapes."""
    ids = list(prompt)
    for _ in range(count):
        row = model(torch.tensor([ids], device=model.device)).logits[0, -1].float()
        ids.append(int(change(row, ids[len(prompt) :]).argmax()))
    return ids[len(prompt) :]


def penalised(presence, frequency):
    def change(row, drawn):
        row = row.clone()
        for token in set(drawn):
            row[token] -= frequency * drawn.count(token) + presence
        return row

    return change


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 1.5), (-0.7, 0.4)])
def test_penalties(device, presence, frequency):
    model = tiny_model("llama", device)
    wanted = greedy(model, PROMPT, 20, penalised(presence, frequency))
    batcher = ContinuousBatching(3, model)
    options = LogitOptions(presence_penalty=presence, frequency_penalty=frequency)
    plain = batcher.submit(PROMPT, GREEDY, 20)
    handle = batcher.submit(PROMPT, GREEDY, 20, logits=options)
    assert_text(model, PROMPT, plain.result().token_ids, greedy(model, PROMPT, 20))
    assert handle.result().token_ids == wanted
    assert is_free(batcher)


def test_the_steps_of_watched_requests_are_recorded(tmp_path, device):
    engine, model = make_engine(tmp_path, device)
    batcher = ContinuousBatching(3, engine)
    options = LogitOptions(logprobs=0)
    handles = [batcher.submit([3, i], GREEDY, 12, logits=options) for i in range(3)]
    batcher.run()
    assert batcher.decode_mode == ("graph" if device.type == "cuda" else "recorded")
    for i, handle in enumerate(handles):
        assert_text(model, [3, i], handle.result().token_ids, greedy(model, [3, i], 12))


def test_biases(device):
    model = tiny_model("llama", device)
    plain = greedy(model, PROMPT, 8)
    batcher = ContinuousBatching(3, model)
    never = batcher.submit(PROMPT, GREEDY, 8, logits=LogitOptions(logit_bias={plain[0]: -100}))
    always = batcher.submit(PROMPT, GREEDY, 8, logits=LogitOptions(logit_bias={17: 100}))
    assert plain[0] not in never.result().token_ids
    assert always.result().token_ids == [17] * 8


def test_logprobs_are_of_the_models_own_distribution(device):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(3, model)
    options = LogitOptions(logprobs=3, presence_penalty=1.0)
    result = batcher.submit(PROMPT, WARM, 9, logits=options).result()
    assert len(result.logprobs) == 9
    ids = list(PROMPT)
    for token, found in zip(result.token_ids, result.logprobs, strict=True):
        row = model(torch.tensor([ids], device=device)).logits[0, -1].float().log_softmax(-1)
        assert math.isclose(found.logprob, float(row[token]), abs_tol=1e-3)
        best = row.topk(3)
        assert [one for one, _ in found.top] == best.indices.tolist()
        for (_, ours), theirs in zip(found.top, best.values.tolist(), strict=True):
            assert math.isclose(ours, theirs, abs_tol=1e-3)
        ids.append(token)
    assert batcher.submit(PROMPT, WARM, 2).result().logprobs is None
    alone = batcher.submit(PROMPT, WARM, 2, logits=LogitOptions(logprobs=0)).result()
    assert [one.top for one in alone.logprobs] == [(), ()]


@pytest.mark.parametrize("length", [3, PAGE, 3 * PAGE + 1])
@pytest.mark.parametrize("rows", [2, 6])
def test_a_group_is_its_answers_one_by_one(device, length, rows):
    model = tiny_model("llama", device)
    prompt = list(range(2, 2 + length))
    params = [SamplingParams(temperature=1.5, seed=seed) for seed in range(5)]
    single = ContinuousBatching(1, model)
    wanted = [single.submit(prompt, one, 11).result().token_ids for one in params]
    batcher = ContinuousBatching(rows, model, share_prefixes=False)
    forwards = []
    prefill = batcher._batch._runner.runner.prefill
    batcher._batch._runner.runner.prefill = lambda chunks, *rest, **more: (
        forwards.extend(len(chunk.tokens) for chunk in chunks),
        prefill(chunks, *rest, **more),
    )[1]
    other = batcher.submit([7, 7], WARM, 30)
    group = batcher.submit_group(prompt, params, 11)
    batcher.step()
    if rows == 6:
        assert forwards == [2, length]  # the prompt was computed once
        assert [len(handle.token_ids) for handle in group] == [1] * 5
    batcher.run()
    for ours, want in zip(group, wanted, strict=True):
        assert_text(model, prompt, ours.result().token_ids, want)
    assert other.result().token_ids == single.submit([7, 7], WARM, 30).result().token_ids
    assert is_free(batcher)


def test_a_group_goes_on_without_its_first(device):
    model = tiny_model("llama", device)
    params = [SamplingParams(temperature=1.5, seed=seed) for seed in range(4)]
    single = ContinuousBatching(1, model)
    wanted = [single.submit(PROMPT, one, 6).result().token_ids for one in params]
    batcher = ContinuousBatching(4, model)
    group = batcher.submit_group(PROMPT, params, 6)
    group[0].cancel()
    group[2].cancel()
    batcher.run()
    assert [handle.cancelled() for handle in group] == [True, False, True, False]
    assert [group[i].result().token_ids for i in (1, 3)] == [wanted[1], wanted[3]]
    group = batcher.submit_group(list(range(2, 40)), params, 6)
    batcher.step()
    for handle in group:
        handle.cancel()
    assert batcher.active_requests == []
    assert is_free(batcher)


def test_groups_under_preemption(device):
    model = tiny_model("llama", device)
    params = [SamplingParams(temperature=1.5, seed=seed) for seed in range(4)]
    single = ContinuousBatching(1, model)
    wanted = [single.submit(PROMPT, one, 20).result().token_ids for one in params]
    batcher = ContinuousBatching(4, model, num_blocks=9)
    batcher._batch.scheduler.expected_share = 0.0
    groups = [batcher.submit_group(PROMPT, params, 20) for _ in range(2)]
    while batcher.active_requests:
        batcher.step()
        batcher._batch.scheduler.check()
    for group in groups:
        for handle, want in zip(group, wanted, strict=True):
            assert_text(model, PROMPT, handle.result().token_ids, want)
    assert any(handle.stats.preemptions for group in groups for handle in group)
    assert is_free(batcher)


def test_time_limits(device):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(1, model)
    busy = batcher.submit(PROMPT, GREEDY, 50)
    batcher.step()
    waits = batcher.submit(PROMPT, GREEDY, 5, wait_limit_s=0.01)
    late = batcher.submit(PROMPT, GREEDY, 5, time_limit_s=0.01)
    patient = batcher.submit(PROMPT, GREEDY, 5, time_limit_s=60, wait_limit_s=60)
    time.sleep(0.02)
    batcher.run()
    assert len(busy.result().token_ids) == 50
    assert len(patient.result().token_ids) == 5
    with pytest.raises(TimeoutError, match="begin within"):
        waits.result()
    with pytest.raises(TimeoutError, match="end within"):
        late.result()
    assert late.request.finish_reason == "error"
    assert is_free(batcher)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"presence_penalty": 3}, "presence_penalty must lie in"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must lie in"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be a number"),
        ({"logit_bias": [1]}, "logit_bias must map"),
        ({"logit_bias": {1: 101}}, r"logit_bias\[1\] must lie in"),
        ({"logit_bias": {"a": 1}}, "a token id must be a whole number"),
        ({"logprobs": 21}, "logprobs must lie in"),
        ({"logprobs": True}, "logprobs must be a whole number"),
        ({"grammar": "json"}, "grammar must be what Structures made"),
    ],
)
def test_refused_options(wrong, words):
    with pytest.raises(ValueError, match=words):
        LogitOptions(**wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"logits": 3}, "logits must be LogitOptions"),
        ({"logits": LogitOptions(logit_bias={10**6: 1})}, "logit_bias: token ids must lie in"),
        ({"time_limit_s": 0}, "time_limit_s must be above 0"),
        ({"wait_limit_s": "x"}, "wait_limit_s must be a number"),
    ],
)
def test_refused_submissions(wrong, words):
    with pytest.raises(ValueError, match=words):
        ContinuousBatching(1, tiny_model("llama")).submit(PROMPT, GREEDY, 5, **wrong)


def test_a_bias_that_leaves_nothing_ends_that_request_alone(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    batcher = ContinuousBatching(2, engine)
    count = engine.loaded.model.get_input_embeddings().num_embeddings
    nothing = batcher.submit(PROMPT, GREEDY, 5, stop_token_ids=range(count), min_tokens=2)
    fine = batcher.submit(PROMPT, GREEDY, 5)
    batcher.run()
    assert len(fine.result().token_ids) == 5
    with pytest.raises(ValueError, match="a token must be left"):
        nothing.result()
