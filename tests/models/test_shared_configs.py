"""Two models of one config object: what is done to one of them is not done to the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from families import tiny_model
from torch.testing import assert_close
from twins import ids_of

from llamatelemetry.inference.flash_attn import (
    FlashAttentionConfig,
    disable_flash_attention,
    enable_flash_attention,
)
from llamatelemetry.models.patching import patch, unpatch

OURS = "llamatelemetry"


def two_models(device):
    """Both of one config object, with other weights."""
    first = tiny_model("llama", device)
    with torch.inference_mode(False):
        second = transformers.LlamaForCausalLM(first.config).eval().to(device)
    assert first.config is second.config
    return first, second


def lifted(model):
    enable_flash_attention(model, FlashAttentionConfig(causal=False))


WAYS = {
    "patch": (patch, unpatch),
    "enable": (enable_flash_attention, disable_flash_attention),
    "not causal": (lifted, disable_flash_attention),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_other_model_stays_as_it_was(way, device):
    do, undo = WAYS[way]
    first, second = two_models(device)
    config, ids = first.config, ids_of(device)
    config._attn_implementation = "eager"
    wants = [model(ids, output_attentions=True) for model in (first, second)]
    do(first)
    assert first.config._attn_implementation == OURS
    assert first.model.layers[0].self_attn.config._attn_implementation == OURS
    assert second.config is config
    assert config._attn_implementation == "eager"
    got = second(ids, output_attentions=True)
    assert_close(got.logits, wants[1].logits, rtol=0, atol=0)
    assert_close(got.attentions, wants[1].attentions, rtol=0, atol=0)
    do(second)
    undo(first)
    assert first.config is config
    assert second.config._attn_implementation == OURS
    assert_close(first(ids).logits, wants[0].logits, rtol=0, atol=0)
    undo(second)
    assert vars(config) == vars(second.config)
    assert "is_causal" not in vars(config)
    assert_close(second(ids).logits, wants[1].logits, rtol=0, atol=0)


def test_an_edit_of_one_config_is_one_of_all(device):
    first, second = two_models(device)
    config = first.config
    patch(first)
    first.config.use_cache = False
    assert second(ids_of(device)).past_key_values is None
    config.output_hidden_states = True
    assert first(ids_of(device)).hidden_states is not None
    assert first.config == config
    assert config == first.config
    unpatch(first)
    assert first.config.use_cache is False


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_of_configs_of_their_own(way, device):
    model = tiny_model("llama", device)
    patch(model)
    twin = way(model)
    assert twin.config is twin.model.layers[0].self_attn.config
    assert twin.config._attn_implementation == OURS
    twin.config.use_cache = copy.copy(model.config).use_cache = False
    assert model.config.use_cache
    unpatch(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert type(twin.config) is transformers.LlamaConfig
    assert model.config._attn_implementation == OURS


def test_what_is_made_of_a_models_config(device, tmp_path):
    model = tiny_model("llama", device)
    patch(model)
    made = type(model.config)(hidden_size=32, num_attention_heads=4)
    assert type(made) is transformers.LlamaConfig
    another = transformers.AutoModelForCausalLM.from_config(model.config)
    assert type(another) is transformers.LlamaForCausalLM
    model.save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(saved) is transformers.LlamaConfig
    assert saved._attn_implementation != OURS


def test_a_model_around_one_that_is_patched(device):
    """Each has chosen our attention for itself; the inner one goes first."""
    outer = tiny_model("llama", device)
    ids = ids_of(device)
    want = outer(ids).logits
    patch(outer.model)
    enable_flash_attention(outer)
    unpatch(outer.model)
    assert outer.config._attn_implementation == OURS
    disable_flash_attention(outer)
    assert {m.config._attn_implementation for m in outer.modules() if hasattr(m, "config")} == {
        "sdpa"
    }
    assert_close(outer(ids).logits, want, rtol=0, atol=0)
