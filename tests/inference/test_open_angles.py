"""A rotary embedding that changes while a generation is open, or between two."""

from __future__ import annotations

import copy

import pytest
import torch
from stepwise import COUNT, PROMPT, SOON, stepwise, twins

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.kv_cache import optimize_kv_cache
from llamatelemetry.inference.sampling import GREEDY

pytestmark = pytest.mark.filterwarnings("ignore")


def angles_in_place(model):
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(0.2)


def angle_scaling(model):
    model.model.rotary_emb.attention_scaling = 1.7


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "quantised"])
@pytest.mark.parametrize("change", [angles_in_place, angle_scaling])
def test_open_ones_follow_the_angles(change, quantised, device):
    model, ours = twins(device=device, quantised=quantised)
    before, wanted = stepwise(model), stepwise(copy.deepcopy(model), change)
    assert before != wanted
    optimize_kv_cache(ours)
    open_ones = TokenGenerator(ours).generate([PROMPT], [GREEDY], COUNT)
    tokens = [next(open_ones)[0] for _ in range(SOON)]
    batcher = ContinuousBatching(2, ours, overlap=False)  # with it, a token more is as it was
    handle = batcher.submit(PROMPT, max_tokens=COUNT)
    while handle.request.num_drawn < SOON:
        batcher.step()
    change(ours)
    tokens += [token for (token,) in open_ones]
    batcher.run()
    assert tokens == wanted
    assert handle.result().token_ids == wanted


def no_table(model):
    model.model.rotary_emb.rope_type = "dynamic"


def own_forward(model):
    rotary = model.model.rotary_emb
    original = rotary.forward
    rotary.forward = lambda x, position_ids: original(x, position_ids * 3)


def no_module(model):
    rotary = model.model._modules.pop("rotary_emb")
    model.model.rotary_emb = lambda x, position_ids: rotary(x, position_ids * 3)


@pytest.mark.parametrize("change", [no_table, own_forward, no_module])
def test_angles_without_a_table_end_open_ones(change, device):
    model, ours = twins(device=device)
    wanted = stepwise(copy.deepcopy(model), change, at=0)
    generator, batcher = TokenGenerator(ours), ContinuousBatching(2, ours)
    open_ones = generator.generate([PROMPT], [GREEDY], COUNT)
    handle = batcher.submit(PROMPT, max_tokens=COUNT)
    for _ in range(SOON):
        next(open_ones), batcher.step()
    change(ours)
    for rest in (lambda: list(open_ones), handle.result):
        with pytest.raises(RuntimeError, match=r"rotary emb.* begin again"):
            rest()
    assert [token for (token,) in generator.generate([PROMPT], [GREEDY], COUNT)] == wanted
