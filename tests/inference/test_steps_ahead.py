"""Steps launched before the host has seen the tokens of the last: as on a GPU, on the CPU too."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, tiny_model
from stepwise import COUNT, PROMPT, SOON, stepwise, twins

from llamatelemetry.inference.decode_step import DecodeStep
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.models.patching import patch

PROMPTS = [PROMPT, PROMPT[:3], PROMPT * 6]
PARAMS = [GREEDY, SamplingParams(temperature=0.9, seed=3), SamplingParams(top_k=5, seed=4)]


@pytest.fixture
def ahead(monkeypatch):
    """On the CPU recordings stand for graphs; gives the number of runs so far."""
    monkeypatch.setattr(DecodeStep, "runs_ahead", property(lambda self: self.replays))
    runs, run = [], DecodeStep.run
    monkeypatch.setattr(DecodeStep, "run", lambda self: runs.append(self) or run(self))
    return runs


def patched(device):
    model = tiny_model("llama", device)
    patch(model)
    return model


def tokens_of(model, params, **options):
    return list(TokenGenerator(model).generate(PROMPTS, params, COUNT, **options))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_same_tokens(device, monkeypatch, penalty):
    model = patched(device)
    params = [*PARAMS[:2], SamplingParams(repetition_penalty=penalty)]
    with monkeypatch.context() as patches:
        patches.setattr(DecodeStep, "runs_ahead", False)
        plain = tokens_of(model, params)
        ends = {plain[3][0], plain[6][1]}  # of two rows, at other steps
        ended = tokens_of(model, params, eos_token_ids=ends)
    monkeypatch.setattr(DecodeStep, "runs_ahead", property(lambda self: self.replays))
    assert tokens_of(model, params) == plain
    assert tokens_of(model, params, eos_token_ids=ends) == ended
    assert any(None in row for row in ended)


def test_no_run_past_the_last_token(device, ahead):
    model = patched(device)
    steps = TokenGenerator(model).generate([PROMPT], [GREEDY], 6)
    next(steps), next(steps)
    assert len(ahead) == 2  # the second token's, and the third's ahead of it
    assert len(list(steps)) == 4
    assert len(ahead) == 5


def other_in_place(model):
    with torch.inference_mode(False), torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-3)


def other_memory(model):
    weight = model.model.norm.weight
    weight.data = -weight.data.flip(0).contiguous()


def other_eps(model):
    for layer in model.model.layers:
        layer.post_attention_layernorm.variance_epsilon = 4.0


@pytest.mark.parametrize("change", [other_in_place, other_memory, other_eps])
def test_a_change_counts_for_the_next_token(device, ahead, change):
    model, ours = twins(device=device)
    steps = TokenGenerator(ours).generate([PROMPT], [GREEDY], COUNT)
    tokens = [next(steps)[0] for _ in range(SOON)]
    change(ours)
    tokens += [token for (token,) in steps]
    before, wanted = stepwise(model), stepwise(model, change)
    assert before != wanted
    assert tokens == wanted


@pytest.mark.gpu
def test_a_stream_that_changes_between_tokens(monkeypatch):
    model = patched("cuda")
    with monkeypatch.context() as patches:
        patches.setattr(DecodeStep, "runs_ahead", False)
        wanted = tokens_of(model, PARAMS)
    assert tokens_of(model, PARAMS) == wanted
    streams = [torch.cuda.default_stream(), torch.cuda.default_stream(), torch.cuda.Stream()]
    steps, found = TokenGenerator(model).generate(PROMPTS, PARAMS, COUNT), []
    for count in range(COUNT):
        with torch.cuda.stream(streams[count % 3]):
            found.append(next(steps))
    assert found == wanted


def test_a_row_that_has_ended_is_loaded_again(device, ahead):
    """Its end token's embedding is NaN, so the step ahead draws none for it."""
    model = tiny_model("llama", device)
    model.config.tie_word_embeddings = False
    with torch.inference_mode(False), torch.no_grad():
        rows = model.model.embed_tokens.weight
        model.lm_head.weight = torch.nn.Parameter(rows.clone(), requires_grad=False)
    patch(model)
    params = [SamplingParams(temperature=5.0, seed=seed) for seed in (3, 4)]
    prompts = [PROMPT[:3], PROMPT[4:8]]
    plain = list(TokenGenerator(model).generate(prompts, params, COUNT))
    others = {*prompts[0], *prompts[1], *plain[0], *(second for _, second in plain)}
    end = next(first for first, _ in plain if first not in others)
    with torch.inference_mode(False), torch.no_grad():
        rows[end] = torch.nan
    generator = TokenGenerator(model)
    steps, found = generator.generate(prompts, params, COUNT, eos_token_ids={end}), []
    while not found or found[-1][0] is not None:
        found.append(next(steps))
    found.append(next(steps))
    list(generator.generate(prompts[::-1], [GREEDY] * 2, 3))  # takes the step's rows
    found += steps
    assert [second for _, second in found] == [second for _, second in plain]


def test_generations_in_turns(device, ahead):
    model = patched(device)
    alone = [list(TokenGenerator(model).generate([p], [GREEDY], COUNT)) for p in PROMPTS]
    generator = TokenGenerator(model)
    open_ones = [generator.generate([p], [GREEDY], COUNT) for p in PROMPTS]
    found = [[next(open_ones[0]), next(open_ones[0])], [], []]  # one is ahead when others begin
    for _ in range(COUNT):
        for rows, steps in zip(found, open_ones, strict=True):
            rows += [row for row in [next(steps, None)] if row is not None]
    assert found == alone


def test_an_abandoned_generation(device, ahead):
    model = patched(device)
    wanted = list(TokenGenerator(model).generate([PROMPT * 2], [GREEDY], COUNT))
    generator = TokenGenerator(model)
    steps = generator.generate([[VOCAB - 1] * 30], [GREEDY], COUNT)
    next(steps), next(steps)
    steps.close()  # what is ahead writes where the next one's keys will be
    assert generator.blocks is not None
    assert generator.blocks.num_sequences == 0
    assert list(generator.generate([PROMPT * 2], [GREEDY], COUNT)) == wanted
