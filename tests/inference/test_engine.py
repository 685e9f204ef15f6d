"""The engine on a tiny GGUF: ragged batches, chunked prefill, ends, stops, seeds, refusals."""

from __future__ import annotations

import pytest
import torch
from gguf_models import write_model

from llamatelemetry.inference import generation
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.loading.find import load_model
from llamatelemetry.models.patching import patch, unpatch

PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 1, 40, 22, 17, 6, 30]]
NEW_TOKENS = 12


def make_engine(tmp_path, device, family="llama"):
    path = tmp_path / "tiny.gguf"
    reference = write_model(path, family)
    loaded = load_model(path, device=device, dtype=torch.float32, exact=True)
    return InferenceEngine(loaded), reference.to(device)


def rows_of(engine, prompts, params=GREEDY, eos=()):
    """The tokens of each row, up to its end."""
    steps = list(engine.generator.generate(prompts, [params] * len(prompts), NEW_TOKENS, eos))
    columns = zip(*steps, strict=True)
    return [[token for token in column if token is not None] for column in columns]


def test_greedy_tokens_are_those_of_transformers(tmp_path, device):
    engine, reference = make_engine(tmp_path, device)
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
    step = engine.generator.step
    warm = SamplingParams(temperature=1.5, seed=3)
    drawn = rows_of(engine, PROMPTS[:1], warm)
    assert engine.generator.step is step
    assert [rows_of(engine, [prompt])[0] for prompt in PROMPTS] == alone
    assert rows_of(engine, PROMPTS[:1], warm) == drawn
    rows_of(engine, PROMPTS[:2])
    assert engine.generator.step is not step


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
    before, step = rows_of(engine, PROMPTS[:1]), engine.generator.step
    model = engine.loaded.model
    other = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    assert rows_of(engine, PROMPTS[:1]) == before
    assert engine.generator.step is not step


def test_a_generation_whose_cache_was_taken_says_so(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    first = engine.generator.generate([PROMPTS[0]], [GREEDY], NEW_TOKENS)
    next(first)
    rows_of(engine, PROMPTS[:1])
    with pytest.raises(RuntimeError, match="a later generate has taken the cache"):
        next(first)


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
    assert engine.infer_batch(["the cat", "on"], max_tokens=NEW_TOKENS)[0] == whole.text


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
    ]:
        with pytest.raises(ValueError, match=sentence):
            next(engine.generator.generate(prompts, params, count))
