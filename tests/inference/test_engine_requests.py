"""What a request may say: messages, defaults of the model, penalties, stops; what fails alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from directories import END, change, write_directory
from engines import NEW_TOKENS, PROMPTS, all_free, make_engine, rows_of

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.defaults import ModelDefaults
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.loading.find import load_model

CPU = torch.device("cpu")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


def test_messages_and_system_prompts(tmp_path):
    engine, _ = make_engine(tmp_path, CPU)
    engine.tokenizer.chat_template = CHAT
    turn = [{"role": "user", "content": "the cat"}]
    text = engine.infer("the cat", NEW_TOKENS, 0.0).text
    assert engine.infer(turn, NEW_TOKENS, 0.0).text == text
    assert "".join(engine.stream(turn, max_tokens=NEW_TOKENS)) == text
    assert engine.infer_batch([turn, "the cat"], max_tokens=NEW_TOKENS) == [text, text]
    led = [{"role": "system", "content": "sat"}, *turn]
    told = engine.infer("the cat", NEW_TOKENS, 0.0, system_prompt="sat")
    assert told.text == engine.infer(led, NEW_TOKENS, 0.0).text
    assert "".join(engine.stream("the cat", max_tokens=NEW_TOKENS, system_prompt="sat")) == (
        told.text
    )
    assert engine.encode("the cat", "sat") == engine.encode(led) != engine.encode(turn)


def test_a_stream_refuses_when_it_is_asked_for(tmp_path):
    engine, _ = make_engine(tmp_path, CPU)
    for options in (
        {"max_tokens": 0},
        {"max_tokens": 1000},
        {"params": 0.5},
        {"stop_sequences": [""]},
        {"system_prompt": "no template"},
    ):
        with pytest.raises(ValueError, match=r"must|needs"):
            engine.stream("the cat", **options)


def test_one_prompt_that_fails_is_alone(tmp_path):
    engine, _ = make_engine(tmp_path, CPU)
    alone = engine.infer_batch(["the cat", "on"], max_tokens=4)
    with pytest.warns(UserWarning, match=r"prompts\[1\] gives no text: prompt and max_tokens must"):
        assert engine.infer_batch(["the cat", "cat " * 200, "on"], max_tokens=4) == [
            alone[0],
            "",
            alone[1],
        ]
    with pytest.raises(ValueError, match="must fit the model's context"):
        engine.infer_batch(["cat " * 200], max_tokens=4)
    assert all_free(engine)


def test_stops_of_a_batch(tmp_path):
    engine, _ = make_engine(tmp_path, CPU)
    whole = engine.infer_batch(["the cat", "on"], max_tokens=NEW_TOKENS)
    stop = whole[0][2:4]
    cut = engine.infer_batch(["the cat", "on"], max_tokens=NEW_TOKENS, stop_sequences=stop)
    assert cut == [text.split(stop)[0] for text in whole]
    assert engine.infer_batch(["the cat"], None, NEW_TOKENS, [stop]) == cut[:1]
    assert engine.stats.generated_tokens < NEW_TOKENS
    with pytest.raises(ValueError, match="stop_sequences must not hold an empty string"):
        engine.infer_batch(["the cat"], stop_sequences="")


def penalised(logits, seen, penalty):
    """As Keskar et al. 2019 have it."""
    for token in set(seen):
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    return logits


def test_a_repetition_penalty_is_that_of_transformers(tmp_path, device):
    engine, reference = make_engine(tmp_path, device)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.7)
    rows = rows_of(engine, PROMPTS, params)
    assert engine.generator.decode_mode == ("graph" if device.type == "cuda" else "recorded")
    assert rows != rows_of(engine, PROMPTS)
    for prompt, ours in zip(PROMPTS, rows, strict=True):
        seen = list(prompt)
        for token in ours:
            ids = torch.tensor([seen], device=device)
            logits = penalised(reference(ids).logits[0, -1], seen, 1.7)
            best, second = logits.topk(2)[0].tolist()
            assert token == logits.argmax() or best - second < 1e-3
            seen.append(token)
    # Steps of the same rows without a penalty stay what they were, and rows in turns too.
    assert rows_of(engine, PROMPTS, params) == rows
    one, other = (
        engine.generator.generate([prompt], [params], NEW_TOKENS) for prompt in PROMPTS[::2]
    )
    pairs = list(zip(one, other, strict=True))
    assert [a for (a,), _ in pairs] == rows[0]
    assert [b for _, (b,) in pairs] == rows[2]


def test_a_row_s_penalty_is_its_own(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.7)
    steps = engine.generator.generate(PROMPTS, [params, GREEDY, params], NEW_TOKENS)
    columns = [list(column) for column in zip(*steps, strict=True)]
    assert columns[1] == rows_of(engine, PROMPTS)[1]
    assert columns[::2] == rows_of(engine, PROMPTS, params)[::2]


def test_infer_takes_min_p_and_a_repetition_penalty(tmp_path):
    engine, _ = make_engine(tmp_path, CPU)
    greedy = engine.infer("the cat", NEW_TOKENS, 0.0).text
    assert engine.infer("the cat", NEW_TOKENS, 1.5, top_k=0, top_p=1.0, min_p=1.0).text == greedy
    assert engine.infer("the cat", NEW_TOKENS, 0.0, repetition_penalty=1.9).text != greedy
    for name, value in (("min_p", 2), ("min_p", None), ("repetition_penalty", 0)):
        assert name in engine.infer("the cat", **{name: value}).error_message


@pytest.mark.parametrize("bad", [None, "x", [1], True, float("nan"), -1])
def test_generation_configs_that_are_none(bad):
    if bad is not None:
        with pytest.raises(ValueError, match="generation_config: SamplingParams: temperature must"):
            ModelDefaults({"temperature": bad, "do_sample": True})
    assert ModelDefaults({}).unasked() == GREEDY


def test_what_the_model_s_generation_config_asks_for(tmp_path):
    path = write_directory(tmp_path / "model")
    change(path / "generation_config.json", temperature=0.3, top_p=0.8, repetition_penalty=1.2)
    engine = InferenceEngine(load_model(path))
    want = {"temperature": 0.3, "top_p": 0.8, "top_k": 40, "repetition_penalty": 1.2, "seed": 7}
    got = engine.infer("abc", 8, seed=7).text
    assert got == "".join(engine.stream("abc", SamplingParams(**want), 8))
    # What a call says holds, also where it says what is the default of infer.
    said = engine.infer("abc", 8, 0.7, 0.9, 40, 7, repetition_penalty=1.0).text
    assert said == "".join(engine.stream("abc", SamplingParams(0.7, 40, 0.9, seed=7), 8))
    greedy = SamplingParams(temperature=0.0, repetition_penalty=1.2)
    assert "".join(engine.stream("abc", None, 8)) == "".join(engine.stream("abc", greedy, 8))
    change(path / "generation_config.json", do_sample=True)
    engine = InferenceEngine(load_model(path))
    sampled = SamplingParams(temperature=0.3, top_p=0.8, repetition_penalty=1.2)
    assert engine.defaults.unasked() == sampled
    assert engine.infer_batch(["abc"], max_tokens=8) == engine.infer_batch(["abc"], sampled, 8)
    change(path / "generation_config.json", do_sample=False)
    assert InferenceEngine(load_model(path)).defaults.filled().temperature == 0


def test_what_the_engine_does_not_serve_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelDefaults({"no_repeat_ngram_size": 0, "num_beams": 1, "eos_token_id": 3})
    with pytest.warns(UserWarning, match="asks for no_repeat_ngram_size, num_beams, which the eng"):
        ModelDefaults({"no_repeat_ngram_size": 3, "num_beams": 4})


def test_an_answer_ends_where_the_tokenizer_says(tmp_path):
    path = write_directory(tmp_path / "model", "mistral", eos_token="<|end|>")
    engine = InferenceEngine(load_model(path))
    assert engine.loaded.eos_ids == (END,)
    tokens = [token for (token,) in engine.generator.generate([[5, 6]], [GREEDY], 9)]
    change(path / "generation_config.json", eos_token_id=tokens[2])
    engine = InferenceEngine(load_model(path))
    assert engine.infer([5, 6], 9, 0.0).tokens_generated == tokens.index(tokens[2]) + 1


def test_logits_of_nan_are_named(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    engine.loaded.model.model.norm.weight.fill_(torch.nan)
    result = engine.infer("the cat", 4)
    assert not result.success
    assert "the model's logits are NaN" in result.error_message
    engine, _ = make_engine(tmp_path, device)
    steps = engine.generator.generate(PROMPTS[:1], [GREEDY], NEW_TOKENS)
    next(steps), next(steps)
    engine.loaded.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the model's logits are NaN"):
        list(steps)
    assert all_free(engine)


def test_a_penalty_and_nan_among_many(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.7)
    wanted = rows_of(engine, PROMPTS, params)
    batcher = ContinuousBatching(4, engine)
    handles = [batcher.submit(prompt, params, NEW_TOKENS) for prompt in PROMPTS]
    plain = batcher.submit(PROMPTS[0], max_tokens=NEW_TOKENS)
    assert [handle.result().token_ids for handle in handles] == wanted
    assert plain.result().token_ids == rows_of(engine, PROMPTS[:1])[0]
    handle = batcher.submit(PROMPTS[0], max_tokens=NEW_TOKENS)
    batcher.step(), batcher.step()
    engine.loaded.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the model's logits are NaN"):
        handle.result()
