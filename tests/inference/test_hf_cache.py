"""KVCache and PagedKVCache behind transformers' Cache: generate and what else it calls."""

from __future__ import annotations

import copy

import pytest
import torch
from families import HEAD_DIM, LAYERS, NUM_KV, VOCAB, tiny_model
from transformers import DynamicCache

from llamatelemetry.inference.kv_cache import KVCache, KVCacheConfig, PagedKVCache

KINDS = ["contiguous", "paged"]


def config_of(rows, device, length=16):
    return KVCacheConfig(
        max_batch_size=rows,
        max_seq_length=length,
        num_layers=LAYERS,
        num_heads=3 * NUM_KV,
        num_kv_heads=NUM_KV,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=device,
    )


def both(kind, rows, device, length=16, names=None):
    """A cache of ours with room for so many rows, and the Cache over it."""
    if kind == "contiguous":
        ours = KVCache(config_of(rows, device, length))
        return ours, ours.for_transformers()
    ours = PagedKVCache(config_of(rows, device, length), page_size=4)
    return ours, ours.for_transformers(range(rows) if names is None else names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_of_transformers(device, kind, options):
    model = tiny_model("llama", device)
    ids = torch.randint(1, VOCAB, (2, 7), device=device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # a shorter row, padded on the left
    asked = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **asked, **options)
    ours, cache = both(kind, 2 * options.get("num_beams", 1), device)
    for _ in range(2):
        assert torch.equal(model.generate(ids, past_key_values=cache, **asked, **options), wanted)
        assert cache.get_seq_length() == 15
        cache.reset()
        assert cache.get_seq_length() == 0
    if kind == "paged":
        ours.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assisted", [False, True], ids=["prompt lookup", "assistant"])
def test_speculative_generation_of_transformers(device, kind, assisted):
    model = tiny_model("llama", device)
    ids = torch.randint(1, VOCAB, (1, 4), device=device).repeat(1, 3)  # there is something to find
    asked = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    if assisted:
        assistant = copy.deepcopy(model)  # right now and then
        with torch.no_grad():
            assistant.model.norm.weight += 0.5 * torch.randn_like(assistant.model.norm.weight)
        asked["assistant_model"] = assistant
    else:
        asked |= {"prompt_lookup_num_tokens": 2, "eos_token_id": 1}
    wanted = model.generate(ids, past_key_values=DynamicCache(config=model.config), **asked)
    ours, cache = both(kind, 1, device, length=64)
    assert torch.equal(model.generate(ids, past_key_values=cache, **asked), wanted)
    if kind == "paged":
        ours.check()


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_a_cache_are_those_of_transformers_cache(device, kind):
    ours, cache = both(kind, 6, device, names=["a", "b"])
    theirs = DynamicCache()

    def same(seqlen, batch):
        kv = torch.randn(LAYERS, 2, batch, NUM_KV, seqlen, HEAD_DIM, device=device)
        for layer in range(LAYERS):
            wanted = theirs.update(*kv[layer], layer)
            for got, want in zip(cache.update(*kv[layer], layer), wanted, strict=True):
                assert torch.equal(got, want)
        assert cache.get_seq_length() == theirs.get_seq_length()
        if kind == "paged":
            ours.check()

    for one in (cache, theirs):
        one.batch_repeat_interleave(2)  # of nothing
    same(7, 2)
    for change in [
        lambda one: one.crop(-2),
        lambda one: one.crop(0),
        lambda one: one.batch_repeat_interleave(3),
        lambda one: one.crop(-4),
        lambda one: one.reorder_cache(torch.tensor([5, 5, 0, 1, 2, 3], device=device)),
        lambda one: one.batch_select_indices(torch.tensor([4, 1, 1], device=device)),
        lambda one: one.batch_select_indices(torch.tensor([True, False, True], device=device)),
    ]:
        change(cache)
        change(theirs)
        same(2, theirs.layers[0].keys.shape[0])
    cache.crop(-100)
    assert cache.get_seq_length() == 0


def test_selected_rows_keep_their_names():
    ours, cache = both("paged", 4, "cpu", names=["a", "b"])
    kv = torch.randn(2, 2, NUM_KV, 3, HEAD_DIM)
    for layer in range(LAYERS):
        cache.update(*kv, layer)
    cache.batch_repeat_interleave(2)
    assert ours.blocks.sequences() == ["a", ("a", 1), "b", ("b", 1)]
    with pytest.raises(RuntimeError, match=r"at most max_batch_size = 4, got 4 \+ 4"):
        cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2]))
    assert ours.blocks.sequences() == ["b"]
    assert torch.equal(ours.get(0, "b")[0], kv[0, 1].transpose(0, 1))


def test_a_batch_that_the_contiguous_cache_has_no_room_for_is_refused():
    _, cache = both("contiguous", 2, "cpu")
    cache.update(*torch.randn(2, 2, NUM_KV, 3, HEAD_DIM), 0)
    with pytest.raises(ValueError, match="rows must be at most max_batch_size = 2, got 4"):
        cache.batch_repeat_interleave(2)


@pytest.mark.parametrize("names", [["c", "c"], ["c", "d", "e"], ["c", []]])
def test_names_that_fail_leave_no_sequence_behind(names):
    ours = PagedKVCache(config_of(2, "cpu"))
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        ours.for_transformers(names)
    assert ours.blocks.sequences() == []


@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
def test_generate_with_the_cache_itself_says_what_to_pass(kind):
    model = tiny_model("llama")
    with pytest.raises(AttributeError, match=rf"takes {kind.__name__}.for_transformers\(\)"):
        model.generate(
            torch.ones(1, 3, dtype=torch.int64), past_key_values=kind(config_of(1, "cpu"))
        )
