"""The engine on a tiny GGUF: ragged batches, chunked prefill, ends, stops, seeds, refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engines import NEW_TOKENS, PROMPTS, all_free, make_engine, rows_of, step_of

from llamatelemetry.inference import generation
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.models.patching import patch, unpatch
from llamatelemetry.ops import QuantFormat


@pytest.mark.parametrize("format", list(QuantFormat), ids=lambda f: f.name)
def test_greedy_tokens_are_those_of_transformers(tmp_path, device, format):
    engine, reference = make_engine(tmp_path, device, format=format)
    for prompt, ours in zip(PROMPTS, rows_of(engine, PROMPTS), strict=True):
        ids = torch.tensor([prompt], device=device)
        for token in ours:
            best, second = reference(ids).logits[0, -1].topk(2)[0].tolist()
            choice = reference(ids).logits[0, -1].argmax()
            assert token == choice or best - second < 1e-3
            ids = torch.cat([ids, torch.tensor([[token]], device=device)], 1)


def test_a_row_of_a_ragged_batch_is_what_it_is_alone(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    alone = [rows_of(engine, [prompt])[0] for prompt in PROMPTS]
    assert engine.generator.decode_mode == ("graph" if device.type == "cuda" else "recorded")
    assert rows_of(engine, PROMPTS) == alone


def test_one_step_serves_later_batches_of_its_size(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    alone = [rows_of(engine, [prompt])[0] for prompt in reversed(PROMPTS)][::-1]
    step = step_of(engine)
    warm = SamplingParams(temperature=1.5, seed=3)
    drawn = rows_of(engine, PROMPTS[:1], warm)
    assert step_of(engine) is step
    assert [rows_of(engine, [prompt])[0] for prompt in PROMPTS] == alone
    assert rows_of(engine, PROMPTS[:1], warm) == drawn
    rows_of(engine, PROMPTS[:2])
    assert step_of(engine, 2) is not step
    assert rows_of(engine, PROMPTS[:1], warm) == drawn


def test_a_model_patched_anew_generates_as_before(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    before = rows_of(engine, PROMPTS[:1])
    unpatch(engine.loaded.model)
    with pytest.raises(ValueError, match="must be patched"):
        rows_of(engine, PROMPTS[:1])
    patch(engine.loaded.model)
    assert rows_of(engine, PROMPTS[:1]) == before


def test_other_weights_get_a_step_of_their_own(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    before, step = rows_of(engine, PROMPTS[:1]), step_of(engine)
    model = engine.loaded.model
    other = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    assert rows_of(engine, PROMPTS[:1]) == before
    assert step_of(engine) is not step


def test_a_prompt_in_chunks_is_the_prompt(tmp_path, device, monkeypatch):
    engine, _ = make_engine(tmp_path, device)
    whole = rows_of(engine, PROMPTS)
    monkeypatch.setitem(generation.PREFILL_TOKENS, device.type, 4)
    assert rows_of(engine, PROMPTS) == whole


def test_a_model_that_cannot_be_recorded_decodes_eagerly_and_says_so(tmp_path):
    engine, _ = make_engine(tmp_path, torch.device("cpu"), "granite")
    assert len(rows_of(engine, PROMPTS)[0]) == NEW_TOKENS
    assert engine.generator.decode_mode == "eager"


def test_a_row_ends_at_its_end_token_and_the_others_go_on(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    free = rows_of(engine, PROMPTS)
    end = free[0][4]
    ended = rows_of(engine, PROMPTS, eos=(end,))
    for whole, cut in zip(free, ended, strict=True):
        length = whole.index(end) + 1 if end in whole else NEW_TOKENS
        assert cut == whole[:length]


def test_a_seed_decides_the_draw_wherever_the_row_stands(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    warm = SamplingParams(temperature=1.5, seed=3)
    alone = rows_of(engine, PROMPTS[:1], warm)[0]
    assert rows_of(engine, PROMPTS[::-1], warm)[-1] == alone
    assert rows_of(engine, PROMPTS[:1], SamplingParams(temperature=1.5, seed=4))[0] != alone


def test_infer_and_stop_sequences(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    whole = engine.infer("the cat", max_tokens=NEW_TOKENS, temperature=0.0)
    assert whole.success
    assert whole.error_message is None
    assert whole.tokens_generated == engine.stats.generated_tokens
    assert whole.tokens_per_sec > 0
    assert len(whole.text) > 2
    stop = whole.text[1:3]
    cut = engine.infer("the cat", NEW_TOKENS, temperature=0.0, stop_sequences=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    as_str = engine.infer("the cat", NEW_TOKENS, temperature=0.0, stop_sequences=stop)
    assert as_str.text == cut.text
    assert engine.infer_batch(["the cat", "on"], max_tokens=NEW_TOKENS)[0] == whole.text
    assert engine.infer_batch([]) == []


def test_stats_of_a_batch_count_all_its_sequences(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    alone = []
    for prompt in ("the cat", "on"):
        engine.infer(prompt, NEW_TOKENS, temperature=0.0)
        alone.append(engine.stats)
    engine.infer_batch(["the cat", "on"], max_tokens=NEW_TOKENS)
    stats = engine.stats
    assert stats.prompt_tokens == sum(s.prompt_tokens for s in alone)
    assert stats.generated_tokens == sum(s.generated_tokens for s in alone)
    assert stats.sequences == 2
    assert stats.first_token_s > 0
    assert stats.decode_tokens_per_s * stats.decode_s == pytest.approx(stats.generated_tokens - 2)


def test_threads_share_an_engine(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    prompts = ["the cat", "on", "the mat the mat", "cat on cat"]
    alone = [engine.infer(prompt, NEW_TOKENS, temperature=0.8, seed=5) for prompt in prompts]
    assert all(result.success for result in alone)
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(
                lambda prompt: engine.infer(prompt, NEW_TOKENS, temperature=0.8, seed=5),
                prompts * 6,
            )
        )
    for result, wanted in zip(results, alone * 6, strict=True):
        assert (result.text, result.error_message) == (wanted.text, None)
        assert result.tokens_generated == wanted.tokens_generated
    assert all_free(engine)


def test_refusals(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    too_long = engine.infer("cat " * 200, max_tokens=4)
    assert (too_long.success, too_long.text, too_long.tokens_generated) == (False, "", 0)
    assert "must fit the model's context of 64 tokens" in too_long.error_message
    assert "temperature" in engine.infer("cat", temperature=-1.0).error_message
    for prompts, params, count, sentence in [
        ([[]], [GREEDY], 4, "at least one token"),
        ([[1]], [], 4, "must be as many"),
        ([[1]], [GREEDY], 0, "max_tokens must be at least 1"),
        ([[1]], [GREEDY], 2.5, "max_tokens must be a whole number, got 2.5"),
        ([[1, 10**6]], [GREEDY], 4, r"token ids must lie in \[0, \d+\), got 1000000"),
        ([[3], [1, -1]], [GREEDY] * 2, 4, r"token ids must lie in \[0, \d+\), got -1"),
        (["ab"], [GREEDY], 4, "prompt: a token id must be a whole number, got 'a'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            next(engine.generator.generate(prompts, params, count))


def test_a_chat_template_that_refuses_is_named(tmp_path):
    engine, _ = make_engine(tmp_path, torch.device("cpu"))
    engine.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    result = engine.infer("the cat")
    assert not result.success
    assert result.error_message == "prompt: the model's chat template refuses it: no system turn"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": None}, "prompt must be text or a sequence of token ids, got None"),
        ({"prompt": b"the cat"}, "prompt must be text or a sequence of token ids, got b'the cat'"),
        ({"prompt": [1.5]}, "prompt: a token id must be a whole number, got 1.5"),
        ({"max_tokens": "9"}, "max_tokens must be a whole number, got '9'"),
        ({"max_tokens": None}, "max_tokens must be a whole number, got None"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"top_k": 2.0}, "top_k must be a whole number, got 2.0"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"stop_sequences": 5}, "stop_sequences must be strings, got 5"),
        ({"stop_sequences": ""}, "stop_sequences must not hold an empty string"),
        ({"stop_sequences": ["a", 5]}, "stop_sequences must be strings, got ['a', 5]"),
    ],
)
def test_wrong_types_are_named(tmp_path, options, sentence):
    engine, _ = make_engine(tmp_path, torch.device("cpu"))
    result = engine.infer(**({"prompt": "the cat", "max_tokens": 2} | options))
    assert not result.success
    assert sentence in result.error_message
    for prompts in ("the cat", ["the cat", 5]):
        with pytest.raises(ValueError, match="must be"):
            engine.infer_batch(prompts)
