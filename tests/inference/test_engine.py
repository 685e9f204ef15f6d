"""The engine on a tiny GGUF: ragged batches, chunked prefill, ends, stops, seeds, refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

import pytest
import torch
from families import OpCounter
from gguf_models import write_model

from llamatelemetry.inference import generation
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.kv_pages import KvPages
from llamatelemetry.inference.runner import DecodeStep, StepRunner
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


def step_of(engine, batch=1):
    """The decode step that the last generation of so many rows used."""
    return engine.generator.runner.decode_step(batch, 1)


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


@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_shuffled_pages_give_the_same_tokens(tmp_path, device, monkeypatch, page_size):
    monkeypatch.setattr(generation, "StepRunner", partial(StepRunner, page_size=page_size))
    engine, _ = make_engine(tmp_path, device)
    in_order = rows_of(engine, PROMPTS)
    for k, v in engine.generator.runner.pages.layers:
        k.fill_(torch.nan), v.fill_(torch.nan)  # no key of the first run is of use to the second
    blocks, random, taken = engine.generator.blocks, Random(0), []
    take = blocks._take

    def take_any():
        random.shuffle(blocks._free)
        taken.append(take())
        return taken[-1]

    monkeypatch.setattr(blocks, "_take", take_any)
    assert rows_of(engine, PROMPTS) == in_order
    assert taken != sorted(taken)
    monkeypatch.setitem(generation.PREFILL_TOKENS, device.type, 4)
    assert rows_of(engine, PROMPTS) == in_order


def all_free(engine):
    blocks = engine.generator.blocks
    blocks.check()
    return blocks.num_sequences == 0 and blocks.num_available == blocks.num_blocks


def test_generations_between_the_steps_of_each_other(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    warm = SamplingParams(temperature=1.5, seed=3)
    batches = [
        (PROMPTS[:1], GREEDY),
        (PROMPTS[1:2], warm),
        (PROMPTS, warm),
        (PROMPTS[2:], GREEDY),
        (PROMPTS[::-1], GREEDY),
    ]
    alone = [rows_of(engine, *batch) for batch in batches]
    end = alone[2][0][3]  # a row of the third batch ends early, and is reloaded as ended
    alone[2] = rows_of(engine, *batches[2], (end,))

    open_ones = [
        engine.generator.generate(
            prompts, [params] * len(prompts), NEW_TOKENS, (end,) if i == 2 else ()
        )
        for i, (prompts, params) in enumerate(batches)
    ]
    steps = [[] for _ in batches]
    random = Random(0)
    while left := [i for i, one in enumerate(open_ones) if one is not None]:
        i = random.choice(left)
        step = next(open_ones[i], None)
        if step is None:
            open_ones[i] = None
        else:
            steps[i].append(step)
        engine.generator.blocks.check()
    for ours, wanted in zip(steps, alone, strict=True):
        columns = zip(*ours, strict=True)
        assert [[t for t in column if t is not None] for column in columns] == wanted
    assert all_free(engine)


def test_an_abandoned_generation_gives_its_blocks_back(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    rows_of(engine, PROMPTS)
    assert all_free(engine)
    started = engine.generator.generate(PROMPTS[:2], [GREEDY] * 2, NEW_TOKENS)
    next(started)
    assert engine.generator.blocks.num_sequences == 2
    del started
    assert all_free(engine)
    # One that is collected while a step is at work waits until that is over.
    started = engine.generator.generate(PROMPTS[:2], [GREEDY] * 2, NEW_TOKENS)
    next(started)
    with engine.generator._lock:
        del started
        assert engine.generator.blocks.num_sequences == 2
    rows_of(engine, PROMPTS[:1])
    assert all_free(engine)


def test_a_prefill_that_fails_gives_its_blocks_back(tmp_path, device, monkeypatch):
    engine, _ = make_engine(tmp_path, device)
    before = rows_of(engine, PROMPTS)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(StepRunner, "prefill", fail)
        with pytest.raises(MemoryError):
            rows_of(engine, PROMPTS)
    assert all_free(engine)
    assert rows_of(engine, PROMPTS) == before


def test_a_cache_that_cannot_grow_keeps_what_it_holds(tmp_path, device, monkeypatch):
    engine, _ = make_engine(tmp_path, device)
    alone = rows_of(engine, PROMPTS[:1])
    started = engine.generator.generate(PROMPTS[:1], [GREEDY], NEW_TOKENS)
    tokens = [next(started)[0]]
    new, calls = KvPages._new, []

    def fail_later(pages, num_blocks):
        calls.append(num_blocks)
        if len(calls) == 2:
            raise MemoryError
        return new(pages, num_blocks)

    with monkeypatch.context() as broken:
        broken.setattr(KvPages, "_new", fail_later)
        with pytest.raises(MemoryError):
            rows_of(engine, PROMPTS)
    tokens += [token for (token,) in started]
    assert [tokens] == alone
    assert rows_of(engine, PROMPTS)[:1] == alone


def test_a_model_that_moves_under_a_generation_is_an_error(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    started = engine.generator.generate(PROMPTS[:1], [GREEDY], NEW_TOKENS)
    next(started)
    engine.loaded.model.bfloat16()
    rows_of(engine, PROMPTS[:1])
    with pytest.raises(RuntimeError, match="the model must stay on its device and in its dtype"):
        next(started)
    assert all_free(engine)


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


def test_a_replayed_step_runs_nothing_outside_the_replay(tmp_path):
    engine, _ = make_engine(tmp_path, torch.device("cpu"))
    rows_of(engine, PROMPTS)
    step = step_of(engine, len(PROMPTS))
    names = [name for name, _ in step.recording.profile()]
    assert (names.count("advance_step_"), names[-1]) == (1, "advance_step_")
    with OpCounter() as counter:
        step.run()
    assert not counter.calls


@pytest.mark.gpu
def test_a_graph_is_captured_under_the_model_s_own_device(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a GPU besides the current one")
    here, _ = make_engine(tmp_path, torch.device("cuda:0"))
    there, _ = make_engine(tmp_path, torch.device("cuda:1"))
    with torch.cuda.device(0):
        wanted = rows_of(here, PROMPTS)
        assert rows_of(there, PROMPTS) == wanted
        with torch.cuda.stream(torch.cuda.Stream()):
            assert rows_of(there, PROMPTS) == wanted
    assert there.generator.decode_mode == "graph"


@pytest.mark.gpu
def test_an_empty_graph_is_an_error(tmp_path, monkeypatch):
    engine, _ = make_engine(tmp_path, torch.device("cuda"))
    monkeypatch.setattr(DecodeStep, "_run_eagerly", lambda self: None)
    with pytest.raises(RuntimeError, match="must hold the step's kernels, got an empty one"):
        rows_of(engine, PROMPTS)


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
        ({"stop_sequences": 5}, "stop_strings must be strings, got 5"),
        ({"stop_sequences": ["a", 5]}, "stop_strings must be strings, got ['a', 5]"),
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
