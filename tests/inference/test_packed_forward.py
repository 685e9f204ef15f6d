"""What the packed decoder does not serve goes the model's own way, with its own results."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch
from cached_models import GREEDY, cache_name, cached_models, prompt, started
from families import VOCAB, quantise_, tiny_model
from transformers import DynamicCache

from llamatelemetry.cuda import disable_cuda_graphs, enable_cuda_graphs
from llamatelemetry.inference.kv_cache import optimize_kv_cache, restore_kv_cache
from llamatelemetry.inference.packed_cache import PackedCache
from llamatelemetry.inference.packed_forward import PackedForward
from llamatelemetry.models.patching import patch, unpatch
from llamatelemetry.models.pieces.arguments import CACHE_NAMES
from llamatelemetry.quantization.modules import QuantLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*no CUDA device holds")


def test_calls_of_other_kinds_have_the_models_own_results(device, caplog):
    plain, ours = cached_models(device)
    name = cache_name(ours)
    ids, more = prompt(device), prompt(device, 3)
    holes = torch.ones(2, 12, dtype=torch.int64, device=device)
    holes[0, 4] = 0
    embedded = plain.get_input_embeddings()(more)
    calls = {
        "output_hidden_states": {"output_hidden_states": True},
        "attention_mask hides": {"attention_mask": holes},
        "position_ids do not fit": {"position_ids": torch.arange(20, 23, device=device)[None]},
        "attention_mask is no": {"attention_mask": holes[:, None, None, :].bool()},
        "logits_to_keep": {"logits_to_keep": torch.tensor([0, 2], device=device)},
        "use_cache": {"use_cache": False},
        "labels": {"labels": more},
        "tuple": {"return_dict": False},
        "inputs_embeds": {"input_ids": None, "inputs_embeds": embedded},
        "input_ids": {"input_ids": more.int()},
    }
    for reason, options in calls.items():
        theirs = DynamicCache(config=plain.config)
        plain(ids, **{name: theirs})
        with caplog.at_level(logging.WARNING, "llamatelemetry"):
            caplog.clear()
            ours.forward._reasons.clear()
            cache = started(ours, ids)
            twin = copy.deepcopy(cache)
            options = {"input_ids": more, **options}
            got = ours(**options, **{name: cache})
            assert cache.rows is None, reason
            ours(**options, **{name: twin})  # is logged once
        wanted = plain(**options, **{name: theirs})
        assert [reason in record.getMessage() for record in caplog.records] == [True]
        logits = slice(0, 1) if isinstance(got, tuple) else "logits"
        torch.testing.assert_close(got[logits], wanted[logits], rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == theirs.get_seq_length()


def test_direct_calls_are_served(device):
    plain, ours = cached_models(device)
    name = cache_name(ours)
    ids, more = prompt(device), prompt(device, 4)
    for pieces in ([more], [more[:, :1], more[:, 1:2], more[:, 2:]]):
        cache, theirs = started(ours, ids), DynamicCache(config=plain.config)
        plain(ids, **{name: theirs})
        for piece in pieces:
            got = ours(piece, **{name: cache}).logits
            torch.testing.assert_close(
                got, plain(piece, **{name: theirs}).logits, rtol=1e-4, atol=1e-4
            )
            assert got.shape == (2, piece.shape[1], VOCAB)
        assert cache.rows is not None


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "quantised"])
def test_a_model_that_changes_is_followed(quantised, device):
    """Steps that were recorded or captured are not replayed for weights that are others now."""
    plain = tiny_model("llama", device)
    with torch.inference_mode(False), torch.no_grad():
        if quantised:
            quantise_(plain)
            for module in plain.modules():
                if isinstance(module, QuantLinear):
                    module.exact = True
    ids, more = prompt(device), prompt(device, 1)

    def other_norm(model):
        with torch.inference_mode(False):
            weight = torch.full_like(model.model.layers[0].input_layernorm.weight, 0.5)
            model.model.layers[0].input_layernorm.weight = torch.nn.Parameter(weight)

    def other_data(model):
        with torch.inference_mode(False):
            model.model.norm.weight.data = torch.full_like(model.model.norm.weight, 0.25)

    def other_eps(model):
        model.model.layers[1].input_layernorm.variance_epsilon = 0.5

    def logits(model, cache):
        return model(more, **{name: cache}).logits

    for change in (other_norm, other_data, other_eps, unpatch):
        with torch.inference_mode(False), torch.no_grad():
            theirs, mine = copy.deepcopy(plain), copy.deepcopy(plain)
            patch(mine, strict=True)
            optimize_kv_cache(mine)
        name = cache_name(mine)
        cache, plain_cache = started(mine, ids), DynamicCache(config=plain.config)
        theirs(ids, **{name: plain_cache})
        for _ in range(3):  # the second and third are replays
            torch.testing.assert_close(
                logits(mine, cache), logits(theirs, plain_cache), rtol=1e-4, atol=1e-4
            )
        assert cache.rows is not None
        change(mine)
        if change is not unpatch:
            change(theirs)
        for _ in range(4):
            torch.testing.assert_close(
                logits(mine, cache), logits(theirs, plain_cache), rtol=1e-4, atol=1e-4
            )
        assert torch.equal(mine.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))
        assert torch.equal(mine.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))


def test_gradients_and_training_go_the_models_own_way(device):
    plain, ours = cached_models(device)
    name = cache_name(ours)
    ids, more = prompt(device), prompt(device, 2)
    cache, theirs = started(ours, ids), DynamicCache(config=plain.config)
    with torch.inference_mode(False), torch.no_grad():
        plain(ids.clone(), **{name: theirs})
    with torch.inference_mode(False), torch.enable_grad():
        ours.requires_grad_(True)
        logits = ours(more.clone(), **{name: cache}).logits
        assert logits.requires_grad
        wanted = plain(more.clone(), **{name: theirs}).logits
    torch.testing.assert_close(logits.detach(), wanted.detach(), rtol=1e-4, atol=1e-4)


def test_threads_take_turns(device):
    plain, ours = cached_models(device)
    prompts = [prompt(device, length) for length in (5, 9, 7)]
    with torch.no_grad():
        wanted = [plain.generate(ids, **GREEDY) for ids in prompts]
    got = [None] * len(prompts)

    def run(i):
        for _ in range(3):
            got[i] = ours.generate(prompts[i], **GREEDY)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("first_undone", ["kv_cache", "cuda_graphs"])
def test_cuda_graphs_bring_the_same_and_go_in_any_order(first_undone, device):
    model = tiny_model("llama", device)
    ids = prompt(device)
    wanted = model.generate(ids, **GREEDY)
    with torch.inference_mode(False), torch.no_grad():
        patch(model, strict=True)
    enable_cuda_graphs(model)
    out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, wanted)
    assert any(isinstance(out.get(name), PackedCache) for name in CACHE_NAMES)
    optimize_kv_cache(model)
    undo = {"kv_cache": restore_kv_cache, "cuda_graphs": disable_cuda_graphs}
    undo.pop(first_undone)(model)
    out = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert any(isinstance(out.get(name), PackedCache) for name in CACHE_NAMES)
    undo.popitem()[1](model)
    assert not {"forward", "_prepare_cache_for_generation"} & model.__dict__.keys()
    assert torch.equal(model.generate(ids, **GREEDY), wanted)


def test_one_below_the_other_can_go(device):
    model = tiny_model("llama", device)
    own = model.forward
    for undone in (restore_kv_cache, disable_cuda_graphs):
        optimize_kv_cache(enable_cuda_graphs(model))
        assert isinstance(model.forward, PackedForward)  # on the graphs
        undone(model)
        assert torch.equal(
            model(prompt := torch.ones(1, 3, dtype=torch.int64, device=device)).logits,
            own(prompt).logits,
        )
        restore_kv_cache(disable_cuda_graphs(model))
        assert "forward" not in model.__dict__


def test_a_copy_has_pages_of_its_own(device):
    plain, ours = cached_models(device)
    ids = prompt(device)
    wanted = plain.generate(ids, **GREEDY)
    ours.generate(ids, **GREEDY)
    with torch.inference_mode(False), torch.no_grad():
        twin = copy.deepcopy(ours)
    assert twin.forward.shared is not ours.forward.shared
    assert twin.forward.shared.model is twin
    assert torch.equal(twin.generate(ids, **GREEDY), wanted)
    cache = started(ours, ids)  # another model's rows
    more = prompt(device, 1)
    name = cache_name(ours)
    theirs = DynamicCache(config=plain.config)
    plain(ids, **{name: theirs})
    torch.testing.assert_close(
        twin(more, **{name: cache}).logits, plain(more, **{name: theirs}).logits,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
