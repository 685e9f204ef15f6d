"""Tokens over transformers' dynamic cache: a patched layer's own way gives what the modules give,
and the cache holds what they would have put there."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from twins import twins

from llamatelemetry.models.hf_layout import KeyLayout
from llamatelemetry.models.hf_masks import KeyMask
from llamatelemetry.models.patching import patch
from llamatelemetry.models.pieces import dynamic
from llamatelemetry.models.pieces.layer import DecoderLayer

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
PROMPT, STEPS = 9, 7


@pytest.fixture(autouse=True)
def _small_rooms(monkeypatch):
    """A step in three finds a room full."""
    monkeypatch.setattr(dynamic, "SPARE_SLOTS", 3)


@pytest.fixture(autouse=True)
def _no_inference_mode():
    with torch.inference_mode(False), torch.no_grad():
        yield


@pytest.fixture
def taken(monkeypatch):
    """Counts the layers that were run by their own way, and the others' calls."""
    counts = {True: 0, False: 0}
    decoded = DecoderLayer._decoded

    def counting(self, call):
        out = decoded(self, call)
        counts[out is not None] += 1
        return out

    monkeypatch.setattr(DecoderLayer, "_decoded", counting)
    return counts


def ids_of(batch, length, device):
    return torch.arange(3, 3 + batch * length, device=device).remainder(97).view(batch, length)


def steps(model, cache, batch, device, count=STEPS, prompt=PROMPT, **options):
    """Logits of a prompt, where the cache is empty, and of so many tokens after it."""
    logits = []
    if not cache.get_seq_length():
        ids = ids_of(batch, prompt, device)
        logits.append(model(ids, past_key_values=cache, **options).logits[:, -1:])
    for i in range(count):
        ids = ids_of(batch, 1, device) + i
        logits.append(model(ids, past_key_values=cache, **options).logits)
    return torch.cat(logits, 1)


def assert_caches(ours, theirs):
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is DynamicLayer
        assert_close(mine.keys, other.keys, **CLOSE)
        assert_close(mine.values, other.values, **CLOSE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "family", ["llama", "llama_bias", "qwen3", "granite", "mistral_full", "arcee"]
)
def test_logits_and_cache(family, batch, device, taken):
    ours, theirs, report = twins(device, family)
    assert not report.refused
    mine, other = DynamicCache(config=ours.config), DynamicCache(config=ours.config)
    taken |= {True: 0, False: 0}
    assert_close(steps(ours, mine, batch, device), steps(theirs, other, batch, device), **CLOSE)
    assert_caches(mine, other)
    assert mine.get_seq_length() == PROMPT + STEPS
    layers = len(ours.model.layers)
    assert taken == {True: layers * STEPS, False: layers}


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "gemma2"])
def test_windows_and_sinks_are_the_modules(family, device):
    model = tiny_model(family, device)
    theirs = copy.deepcopy(model)
    patch(model)
    mine, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    assert_close(steps(model, mine, 2, device), steps(theirs, other, 2, device), **CLOSE)


def test_generate_gives_the_same_tokens(device, taken):
    ours, theirs, _ = twins(device)
    ids = ids_of(2, PROMPT, device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        before = taken[True]
        got = ours.generate(ids, do_sample=False, **options, **more)
        assert torch.equal(got, theirs.generate(ids, do_sample=False, **options, **more))
        assert taken[True] > before


def test_padding_goes_the_modules_way(device, taken):
    ours, theirs, _ = twins(device)
    ids = ids_of(2, PROMPT, device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    taken[True] = 0
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert taken[True] == 0


def test_a_copy_of_a_cache_goes_on_by_itself(device):
    ours, theirs, _ = twins(device)
    mine, other = DynamicCache(config=ours.config), DynamicCache(config=ours.config)
    steps(ours, mine, 1, device)
    steps(theirs, other, 1, device)
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        twin = copy.deepcopy(other)
        got = steps(ours, copied, 1, device, 5)
        assert_close(got, steps(theirs, twin, 1, device, 5), **CLOSE)
        assert_caches(copied, twin)
    assert_caches(mine, other)
    assert_close(steps(ours, mine, 1, device, 2), steps(theirs, other, 1, device, 2), **CLOSE)


def test_what_was_read_from_a_cache_stays(device):
    """Of tensors of the cache that somebody holds no value changes, whatever is done to it."""
    ours, _, _ = twins(device)
    cache = DynamicCache(config=ours.config)
    steps(ours, cache, 2, device, 2)
    held = cache.layers[0].keys
    kept = held.clone()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
    steps(ours, cache, 2, device, 5)
    assert torch.equal(held, kept)


@pytest.mark.parametrize("change", ["crop", "select", "repeat", "reorder", "swap", "in_place"])
def test_a_cache_that_is_changed(change, device):
    ours, theirs, _ = twins(device)
    caches = DynamicCache(config=ours.config), DynamicCache(config=ours.config)
    batch = 2
    for model, cache in zip((ours, theirs), caches, strict=True):
        steps(model, cache, 2, device, 4)
        for layer in cache.layers:
            if change == "crop":
                layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
            elif change == "select":
                layer.batch_select_indices(torch.tensor([1], device=device))
                batch = 1
            elif change == "repeat":
                layer.batch_repeat_interleave(2)
                batch = 4
            elif change == "reorder":
                layer.reorder_cache(torch.tensor([1, 0], device=device))
            elif change == "swap":
                layer.keys, layer.values = layer.values, layer.keys
            else:
                layer.keys.mul_(0.5)
    got, want = (
        steps(model, cache, batch, device)
        for model, cache in zip((ours, theirs), caches, strict=True)
    )
    assert_close(got, want, **CLOSE)
    assert_caches(*caches)


def test_hooks_on_parts_are_run(device):
    ours, theirs, _ = twins(device)
    for part in ("self_attn", "mlp", "input_layernorm"):
        for model in (ours, theirs):
            module = model.model.layers[1].get_submodule(part)
            handle = module.register_forward_hook(_doubled)
            cache = DynamicCache(config=model.config)
            logits = steps(model, cache, 1, device)
            handle.remove()
            if model is ours:
                got = logits
        assert_close(got, logits, **CLOSE)


def _doubled(module, args, output):
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.up_proj", "input_layernorm"])
def test_new_weights_between_tokens(part, device):
    ours, theirs, _ = twins(device)
    caches = DynamicCache(config=ours.config), DynamicCache(config=ours.config)
    for model, cache in zip((ours, theirs), caches, strict=True):
        steps(model, cache, 1, device, 2)
        module = model.model.layers[0].get_submodule(part)
        module.weight = nn.Parameter(1.5 * module.weight.detach().flip(0))
    got, want = (
        steps(model, cache, 1, device) for model, cache in zip((ours, theirs), caches, strict=True)
    )
    assert_close(got, want, **CLOSE)


def test_hidden_states_and_attentions_are_given(device):
    ours, theirs, _ = twins(device)
    outs = []
    for model in (ours, theirs):
        cache = DynamicCache(config=model.config)
        steps(model, cache, 1, device, 2)
        outs.append(
            model(
                ids_of(1, 1, device), past_key_values=cache, output_hidden_states=True,
                output_attentions=True,
            )
        )  # fmt: skip
    for mine, other in zip(outs[0].hidden_states, outs[1].hidden_states, strict=True):
        assert_close(mine, other, **CLOSE)
    weights = outs[0].attentions
    assert [x.shape[2:] for x in weights] == [(1, PROMPT + 3)] * len(ours.model.layers)


def test_a_cache_made_in_inference_mode_is_used_outside(device):
    ours, theirs, _ = twins(device)
    got = []
    for model in (ours, theirs):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            steps(model, cache, 1, device, 2)
        got.append(steps(model, cache, 1, device, 4))
    assert_close(*got, **CLOSE)


def test_an_update_of_somebodys_own_is_called(device, monkeypatch, taken):
    ours, _, _ = twins(device)
    calls = []
    update = DynamicLayer.update

    def counting(self, *args, **kwargs):
        calls.append(self)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", counting)
    taken[True] = 0
    steps(ours, DynamicCache(config=ours.config), 1, device, 2)
    assert len(calls) == 3 * len(ours.model.layers)
    assert taken[True] == 0


def test_a_static_cache_goes_the_modules_way(device, taken):
    ours, theirs, _ = twins(device)
    taken[True] = 0
    caches = (StaticCache(config=ours.config, max_cache_len=32) for _ in range(2))
    got, want = (
        steps(model, cache, 1, device) for model, cache in zip((ours, theirs), caches, strict=True)
    )
    assert_close(got, want, **CLOSE)
    assert taken[True] == 0


def test_a_copy_of_a_layer_is_not_written_over(device):
    """Two layers that hold the same keys part ways with their next tokens."""
    ours, theirs, _ = twins(device)
    caches = DynamicCache(config=ours.config), DynamicCache(config=ours.config)
    outs = []
    for model, cache in zip((ours, theirs), caches, strict=True):
        steps(model, cache, 1, device, 2)
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        outs.append([steps(model, each, 1, device, n) for each, n in ((cache, 2), (other, 3))])
        assert_close(cache.layers[0].keys[:, :, :-1], other.layers[0].keys[:, :, :-2], **CLOSE)
        outs[-1].append(steps(model, cache, 1, device, 1))
    for got, want in zip(*outs, strict=True):
        assert_close(got, want, **CLOSE)


def test_a_mask_for_several_caches(device):
    """What layers share is of one cache, whoever else is given the same mask."""
    ours, _, _ = twins(device)
    caches = [DynamicCache(config=ours.config) for _ in range(2)]
    for i, cache in enumerate(caches):
        ours((ids_of(1, PROMPT, device) + i) % 97, past_key_values=cache)
    want = [steps(ours, copy.deepcopy(cache), 1, device, 1) for cache in caches]
    layout = KeyLayout(1, 1, PROMPT + 1, PROMPT, True, -1, -1, None)
    mask = KeyMask(layout, torch.device(device))
    for cache, logits in zip(caches, want, strict=True):
        assert_close(steps(ours, cache, 1, device, 1, attention_mask=mask), logits)
