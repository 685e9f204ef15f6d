"""optimize_kv_cache: generate of a model in our buffers, with the same tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import LAYERS, VOCAB, tiny_model
from transformers.cache_utils import DynamicLayer

from llamatelemetry.inference.kv_cache import KVCache, optimize_kv_cache, restore_kv_cache

OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 4, "num_return_sequences": 4},
    "lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": 1},
    "chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "ministral"])  # none, all, some slide
def test_generate_gives_the_same_tokens(family, options, device):
    model = tiny_model(family, device)
    batch = 1 if "prompt_lookup_num_tokens" in options else 2
    ids = torch.randint(1, VOCAB, (batch, 4), device=device).repeat(1, 3)
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
    wanted = model.generate(ids, **asked)
    assert optimize_kv_cache(model) is model
    for _ in range(2):
        assert torch.equal(model.generate(ids, **asked), wanted)
    assert restore_kv_cache(model) is model
    assert torch.equal(model.generate(ids, **asked), wanted)


def test_steps_write_into_one_buffer_until_it_is_restored(device, monkeypatch):
    model = optimize_kv_cache(tiny_model("llama", device))
    ids = torch.randint(1, VOCAB, (2, 5), device=device)
    asked = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    addresses, update = set(), KVCache.update

    def recorded(self, *args, **kwargs):
        k, v = update(self, *args, **kwargs)
        addresses.update((k.data_ptr(), v.data_ptr()))
        return k, v

    monkeypatch.setattr(KVCache, "update", recorded)
    out = model.generate(ids, **asked)
    assert len(addresses) == 2 * LAYERS
    assert all(layer.cache.config.max_seq_length == 12 for layer in out.past_key_values.layers)
    # The cache that comes back serves on: it grows as transformers' own does.
    more = model.generate(out.sequences, past_key_values=out.past_key_values, **asked)
    restore_kv_cache(model)
    plain = model.generate(ids, **asked | {"max_new_tokens": 16})
    assert torch.equal(more.sequences, plain.sequences)
    assert all(type(layer) is DynamicLayer for layer in plain.past_key_values.layers)


def test_a_copy_generates_by_itself(device):
    model = optimize_kv_cache(tiny_model("llama", device))
    ids = torch.randint(1, VOCAB, (2, 5), device=device)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._prepare_cache_for_generation.args == (other,)
        assert torch.equal(other.generate(ids, max_new_tokens=4, do_sample=False), wanted)


def test_refusals():
    with pytest.raises(ValueError, match=r"optimize_kv_cache: model must be .* got Linear"):
        optimize_kv_cache(torch.nn.Linear(2, 2))
    assert isinstance(restore_kv_cache(torch.nn.Linear(2, 2)), torch.nn.Linear)
