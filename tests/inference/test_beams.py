"""Beams of a batch: the texts of transformers' search, whoever is beside them."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest
import torch
from batching import PAGE, PROMPTS, WARM, alone, assert_text, is_free
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.speculation_config import SpeculationConfig

# num_beams, length_penalty, early_stopping, stop ids, min_tokens, max_tokens, answers
SEARCHES = [
    (3, 1.0, False, (5,), 0, 14, 3),
    (3, 1.0, True, (5, 9), 4, 14, 2),
    (4, 2.0, "never", (5, 9, 11), 4, 12, 1),
    (2, 0.0, False, (), 0, 9, 1),
    (4, -1.0, False, (5, 9, 11), 0, 6, 4),
    (2, 1.0, True, (), 0, 1, 2),
]


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


@pytest.fixture(scope="module")
def models():
    """By device, a model whose distributions are sharp enough for texts to end."""
    made = {}

    def of(device):
        if device.type not in made:
            with torch.inference_mode(False), torch.no_grad():
                made[device.type] = tiny_model("llama", device)
                made[device.type].lm_head.weight.mul_(3)
        return made[device.type]

    return of


def searched(model, prompt, search):
    """transformers' texts, by its own forward."""
    beams, penalty, early, stops, least, most, count = search
    ends = {"eos_token_id": list(stops)} if stops else {}
    if least:
        ends["min_new_tokens"] = least
    with torch.no_grad():
        rows = model.generate(
            torch.tensor([prompt], device=model.device),
            num_beams=beams,
            num_return_sequences=count,
            length_penalty=penalty,
            early_stopping=early,
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=96,
            **ends,
        )
    found = []
    for row in rows[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        found.append(row[:end])
    return found


def submitted(batcher, prompt, search):
    beams, penalty, early, stops, least, most, count = search
    return batcher.submit_group(
        prompt,
        [None] * count,
        most,
        num_beams=beams,
        length_penalty=penalty,
        early_stopping=early,
        stop_token_ids=stops,
        min_tokens=least,
    )


def run(batcher):
    steps = 0
    while batcher.active_requests:
        batcher.step()
        batcher._batch.scheduler.check()
        steps += 1
        assert steps < 2000
    assert is_free(batcher)


def texts(groups):
    return [[handle.token_ids for handle in group] for group in groups]


@pytest.mark.parametrize("search", SEARCHES)
def test_the_answers_are_those_of_generate(device, models, search):
    model, prompt = models(device), PROMPTS[4]
    wanted = searched(model, prompt, search)
    batcher = ContinuousBatching(4, model)
    group = submitted(batcher, prompt, search)
    assert batcher.active_requests == group
    run(batcher)
    assert texts([group]) == [wanted]
    stops = search[3]
    for handle in group:
        reason = "stop" if handle.token_ids[-1] in stops else "length"
        assert handle.result().finish_reason == reason
        assert handle.stats.num_tokens == len(handle.token_ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 40, "max_batch_size": 12},
        {"num_blocks": 40, "max_batch_size": 12, "num_host_blocks": 40},
        {"overlap": True, "max_step_tokens": 6},
        {"share_prefixes": False, "speculation": SpeculationConfig(prompt_lookup_min=1)},
    ],
)
def test_beside_others_and_short_of_room(device, models, options):
    model = models(device)
    searches = [(prompt, SEARCHES[i]) for i, prompt in enumerate(PROMPTS[:4])]
    wanted = [searched(model, *one) for one in searches]
    batcher = ContinuousBatching(engine=model, **({"max_batch_size": 5} | options))
    batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some are preempted
    groups, others = [], []
    for i, one in enumerate(searches):
        groups.append(submitted(batcher, *one))
        others.append(batcher.submit(PROMPTS[i], WARM, 10))
    run(batcher)
    assert texts(groups) == wanted
    for prompt, handle in zip(PROMPTS, others, strict=False):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, 10, WARM))
    taken = sum(one.request.preemptions for group in groups for one in group[0].together)
    assert (taken > 0) == ("num_blocks" in options)
    assert batcher.telemetry.summary()["requests"] == sum(map(len, groups)) + len(others)


def test_searches_that_wait_for_one_another_s_rows(device, models):
    """Each has one of four rows, and needs three."""
    model = models(device)
    batcher = ContinuousBatching(4, model)
    groups = [submitted(batcher, prompt, SEARCHES[0]) for prompt in PROMPTS[:4]]
    batcher.step()
    assert [one.name for one in batcher._batch.scheduler.running] == [0, 3, 6, 9]
    run(batcher)
    assert texts(groups) == [searched(model, prompt, SEARCHES[0]) for prompt in PROMPTS[:4]]
    assert groups[-1][0].request.preemptions > 0


def test_one_that_is_cancelled_and_one_that_fails_end_all(device, models, monkeypatch):
    model = models(device)
    batcher = ContinuousBatching(6, model)
    gone = submitted(batcher, PROMPTS[0], SEARCHES[0])
    kept = submitted(batcher, PROMPTS[4], SEARCHES[1])
    for _ in range(3):
        batcher.step()
    gone[1].cancel()
    assert all(one.cancelled() for one in gone)
    with pytest.raises(CancelledError):
        gone[0].result()
    run(batcher)
    assert texts([kept]) == [searched(model, PROMPTS[4], SEARCHES[1])]
    late = submitted(batcher, PROMPTS[4], SEARCHES[0])
    while batcher.decode_mode == "eager" or not batcher._batch.scheduler.running:
        batcher.step()
    weight = model.lm_head.weight
    old = weight.data.clone()
    weight.data.fill_(torch.nan)
    try:
        with pytest.raises(FloatingPointError, match="NaN"):
            late[0].result()
    finally:
        weight.data.copy_(old)
    assert all(isinstance(one.error, FloatingPointError) for one in late)
    assert is_free(batcher)


def test_an_answer_whose_text_fails_ends_its_search_alone(device, models, monkeypatch):
    model = models(device)
    batcher = ContinuousBatching(6, model)
    bad, beside = (submitted(batcher, PROMPTS[4], SEARCHES[0])[0] for _ in range(2))

    def failing(tokens):
        raise RuntimeError("of the text")

    monkeypatch.setattr(bad, "answered", failing)
    run(batcher)
    with pytest.raises(RuntimeError, match="of the text"):
        bad.result()
    assert beside.token_ids == searched(model, PROMPTS[4], SEARCHES[0])[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_beams": 5}, r"num_beams must be at most max_batch_size \(4\)"),
        ({"length_penalty": "x"}, "length_penalty must be a number, got 'x'"),
        ({"length_penalty": 31}, r"length_penalty must lie in \[-30, 30\], got 31"),
        ({"length_penalty": float("nan")}, r"length_penalty must lie in \[-30, 30\], got nan"),
        ({"num_beams": 1, "length_penalty": 5.0}, "length_penalty must be left out with num_b"),
        ({"num_beams": 1, "early_stopping": True}, "early_stopping must be left out with num_b"),
        ({"early_stopping": "no"}, "early_stopping must be True, False or 'never', got 'no'"),
        ({"logits": LogitOptions(logprobs=1)}, "logits must be left out with num_beams"),
        ({"stop_token_ids": range(60)}, "num_beams must be so few that the model has the 122 tok"),
    ],
)
def test_refusals(device, models, wrong, message):
    batcher = ContinuousBatching(4, models(device))
    with pytest.raises(ValueError, match=message):
        batcher.submit([1, 2], GREEDY, 4, **({"num_beams": 2} | wrong))
    assert batcher.active_requests == []


def test_refusals_of_params_and_blocks(device, models):
    batcher = ContinuousBatching(4, models(device), num_blocks=4)
    with pytest.raises(ValueError, match="params must be greedy"):
        batcher.submit([1, 2], SamplingParams(), 4, num_beams=2)
    with pytest.raises(ValueError, match=r"params must be of at most num_beams \(2\) answers"):
        batcher.submit_group([1, 2], [None] * 3, 4, num_beams=2)
    with pytest.raises(
        RuntimeError, match="in each of 2 beams need 6 blocks of 4 tokens, the whole"
    ):
        batcher.submit([1, 2], GREEDY, 8, num_beams=2)
    assert len(batcher.submit([1, 2], GREEDY, 4, num_beams=2).result().token_ids) == 4
