"""The generator's pages, generations side by side, and what ends them; graphs and recordings."""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
import torch
from engines import NEW_TOKENS, PROMPTS, all_free, make_engine, rows_of, step_of
from families import OpCounter

from llamatelemetry.inference import generation
from llamatelemetry.inference.kv_pages import KvPages
from llamatelemetry.inference.runner import DecodeStep, StepRunner
from llamatelemetry.inference.sampling import GREEDY, SamplingParams


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


def test_weights_that_move_under_a_generation_are_followed(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    alone = rows_of(engine, PROMPTS[2:])
    started = engine.generator.generate(PROMPTS[2:], [GREEDY], 50)  # to the context's end
    tokens = [next(started)[0]]
    model = engine.loaded.model
    other = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    assert rows_of(engine, PROMPTS[2:]) == alone
    tokens += [token for (token,) in started]
    assert len(tokens) == 50
    assert tokens[:NEW_TOKENS] == alone[0]


def test_a_model_that_moves_under_a_generation_is_an_error(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    started = engine.generator.generate(PROMPTS[:1], [GREEDY], NEW_TOKENS)
    next(started)
    engine.loaded.model.bfloat16()
    rows_of(engine, PROMPTS[:1])
    with pytest.raises(RuntimeError, match="the model must stay on its device and in its dtype"):
        next(started)
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
        pytest.skip("needs two GPUs")
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
