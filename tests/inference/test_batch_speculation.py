"""Drafted tokens in a batch: the text is that without a draft, whatever is drafted for whom."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from batching import COUNTS, PAGE, PROMPTS, is_free
from drafting import PARAMS, SPECULATION, draft_from, served, small_llama, texts_of, tokens_of
from engines import make_engine
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.speculation_config import SpeculationConfig
from llamatelemetry.inference.verify_step import VerifyStep


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 14},
        {"num_blocks": 14, "num_host_blocks": 40, "share_prefixes": False},
        {"overlap": True},
        {"max_step_tokens": 6},
    ],
)
def test_the_text_is_the_same(device, monkeypatch, options):
    model = tiny_model("llama", device)
    wanted, plain_steps, _ = served(model, None, **options)
    for wrong_each in (0, 5, 1):
        if wrong_each:
            draft_from(monkeypatch, texts_of(wanted), wrong_each)
        handles, steps, batcher = served(model, SPECULATION, **options)
        assert tokens_of(handles) == tokens_of(wanted)
        assert sum(handle.request.num_drafted for handle in handles) > 0
        accepted = sum(handle.request.num_accepted for handle in handles)
        if wrong_each == 5:
            assert accepted > 20
            assert steps < plain_steps * 0.8
        assert wrong_each != 1 or accepted == 0
    assert any(handle.stats.preemptions for handle in handles) == ("num_blocks" in options)
    assert batcher.decode_mode == ("graph" if device.type == "cuda" else "recorded")


def test_ends_penalties_biases_and_log_probabilities(device, monkeypatch):
    model = tiny_model("llama", device)
    options = LogitOptions(presence_penalty=1.5, logit_bias={7: 2.0}, logprobs=2)
    plain, _, _ = served(model, None)
    each = [
        {"stop_token_ids": [plain[0].token_ids[7]], "min_tokens": 3},
        {"logits": options},
        {"min_tokens": 5, "stop_token_ids": plain[2].token_ids[2:4]},
        {"logits": LogitOptions(frequency_penalty=0.8)},
        {"speculate": False},
    ]
    wanted, _, _ = served(model, None, each)
    draft_from(monkeypatch, texts_of(wanted), 4)
    handles, _, _ = served(model, SPECULATION, each)
    assert tokens_of(handles) == tokens_of(wanted)
    assert {reason for _, reason in tokens_of(handles)} == {"stop", "length"}
    ours, theirs = (one[1].result().logprobs for one in (handles, wanted))
    assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-4)
    assert [handle.request.num_accepted > 0 for handle in handles] == [True] * 4 + [False]
    assert handles[4].request.num_drafted == 0


class Counting:
    """A grammar whose text counts up from the last token, and refuses all else."""

    is_complete = False

    def __init__(self, last=3):
        self.last = last

    def matcher(self):
        return Counting(self.last)

    def fill(self, words, row):
        words[row] = 0
        token = self.last + 1
        words[row, token // 32] = 1 << (token % 32) if token % 32 < 31 else -(2**31)

    def accept(self, token):
        assert token == self.last + 1
        self.last = token


def test_a_grammar_and_an_error_of_one(device, monkeypatch):
    model = tiny_model("llama", device)
    draft_from(monkeypatch, [[5, 9, 2, *range(4, 50)]], 50)
    batcher = ContinuousBatching(3, model, speculation=SPECULATION)
    counting = batcher.submit(PROMPTS[0], GREEDY, 20, logits=LogitOptions(grammar=Counting()))
    plain = batcher.submit(PROMPTS[1], GREEDY, 20)
    fails = batcher.submit(PROMPTS[4], GREEDY, 20, logits=LogitOptions(grammar=Counting(200)))
    batcher.run()
    assert counting.token_ids == list(range(4, 24))
    assert counting.request.num_accepted >= 15
    assert isinstance(fails.error, IndexError)
    alone = ContinuousBatching(1, model).submit(PROMPTS[1], GREEDY, 20)
    assert plain.token_ids == alone.result().token_ids
    assert is_free(batcher)


def test_stop_strings_and_several_answers(tmp_path, device, monkeypatch):
    engine, _ = make_engine(tmp_path, device)
    params = [SamplingParams(temperature=1.5, seed=seed) for seed in range(3)]

    def answers(speculation, stop=()):
        batcher = ContinuousBatching(3, engine, speculation=speculation)
        return [
            handle.result()
            for handle in batcher.submit_group("the cat", params, 20, stop_sequences=stop)
        ]

    free = answers(None)
    stop = free[1].text[6:8]
    wanted = answers(None, stop)
    ids = engine.encode("the cat")
    draft_from(monkeypatch, [[*ids, *one.token_ids] for one in free], 7)
    found = answers(SPECULATION, stop)
    assert sum(one.stats.drafted_tokens for one in found) > 0
    assert [(one.text, one.token_ids, one.finish_reason) for one in found] == [
        (one.text, one.token_ids, one.finish_reason) for one in wanted
    ]


def test_a_cancelled_request_and_those_beside_it(device, monkeypatch):
    model = tiny_model("llama", device)
    wanted = ContinuousBatching(1, model).submit(PROMPTS[0], GREEDY, 30).result().token_ids
    draft_from(monkeypatch, [PROMPTS[0] + wanted], 4)
    batcher = ContinuousBatching(2, model, speculation=SPECULATION)
    kept, gone = (batcher.submit(PROMPTS[i], GREEDY, 30) for i in (0, 2))
    while min(one.stats.drafted_tokens for one in (kept, gone)) == 0:
        batcher.step()
    assert not gone.done()
    gone.cancel()
    assert kept.result().token_ids == wanted
    assert is_free(batcher)


def test_a_step_is_recorded_once_for_rows_and_tokens(device, monkeypatch):
    model = tiny_model("llama", device)
    wanted, _, _ = served(model, None)
    draft_from(monkeypatch, texts_of(wanted), 5)
    made = Counter()
    init = VerifyStep.__init__
    monkeypatch.setattr(
        VerifyStep,
        "__init__",
        lambda self, model, state, rows, width, size, graphs, *more: (
            made.update([(rows, width, *more)]),
            init(self, model, state, rows, width, size, graphs, *more),
        )[1],
    )
    _, _, batcher = served(model, SPECULATION)
    before = len(made)
    for prompt, params, count in zip(PROMPTS, PARAMS, COUNTS, strict=True):
        batcher.submit(prompt, params, count + 12)
    batcher.run()
    assert len(made) == sum(made.values()) == before <= 8


def test_nan_is_an_error_and_an_interrupted_forward_is_none(device, monkeypatch):
    model = tiny_model("llama", device)
    wanted = ContinuousBatching(1, model).submit(PROMPTS[0], GREEDY, 20).result().token_ids
    draft_from(monkeypatch, [PROMPTS[0] + wanted], 4)
    step_of = StepRunner.step_of
    fails = [True]

    def failing(self, kind, *args):
        if kind is VerifyStep and fails.pop():
            fails.append(False)
            raise RuntimeError("of this forward alone")
        if not fails:
            fails.append(False)
        return step_of(self, kind, *args)

    monkeypatch.setattr(StepRunner, "step_of", failing)
    batcher = ContinuousBatching(1, model, speculation=SPECULATION)
    assert batcher.submit(PROMPTS[0], GREEDY, 20).result().token_ids == wanted
    handle = batcher.submit(PROMPTS[0], GREEDY, 20)
    while handle.request.num_drafted == 0:
        batcher.step()
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        handle.result()
    assert is_free(batcher)


@pytest.mark.parametrize("wrong_each", [1, 3])
def test_the_distribution_is_the_target_s(device, monkeypatch, wrong_each):
    """Three tokens of a small vocabulary, against their probabilities: chi-square over them."""
    model, prompt, draws = small_llama(4, 1.0).to(device), [1, 2, 0], 800
    with torch.inference_mode():
        cells = {}
        for cell in product(range(4), repeat=3):
            logits = model(torch.tensor([[*prompt, *cell]], device=device)).logits[0, 2:-1]
            chances = logits.double().softmax(-1)[range(3), cell]
            cells[cell] = float(chances.prod()) * draws
    best = max(cells, key=cells.get)
    draft_from(monkeypatch, [[*prompt, *best]], wrong_each)
    batcher = ContinuousBatching(8, model, speculation=SPECULATION)
    handles = [
        batcher.submit(prompt, SamplingParams(temperature=1.0, seed=seed), 3)
        for seed in range(draws)
    ]
    batcher.run()
    counts = Counter(tuple(handle.token_ids) for handle in handles)
    statistic = sum((counts[cell] - n) ** 2 / n for cell, n in cells.items())
    assert statistic / (len(cells) - 1) < 1.6  # above it once in a thousand
    assert sum(handle.request.num_drafted for handle in handles) >= draws


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be at least 1, got 0"),
        ({"num_speculative_tokens": 16}, "num_speculative_tokens must be at most 15, got 16"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_max must be at least prompt_lookup_min"),
        ({"prompt_lookup_max": 10**6}, "prompt_lookup_max must be at most 32, got 1000000"),
        ({"adaptive": "no"}, "adaptive must be True or False, got 'no'"),
        ({"prompt_lookup_min": 1.5}, "prompt_lookup_min must be a whole number, got 1.5"),
    ],
)
def test_refusals_of_the_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        SpeculationConfig(**wrong)


def test_refusals_of_the_batch(device):
    model = tiny_model("llama", device)
    with pytest.raises(ValueError, match="speculation must be a SpeculationConfig or None, got 4"):
        ContinuousBatching(2, model, speculation=4)
    with pytest.raises(ValueError, match="split_size must be 0 with speculation"):
        ContinuousBatching(2, model, speculation=SPECULATION, split_size=64)
    batcher = ContinuousBatching(2, model, speculation=SPECULATION)
    with pytest.raises(ValueError, match="speculate must be True or False, got 'no'"):
        batcher.submit([1], max_tokens=9, speculate="no")
