"""What a LayerSpec says is done, or refused by name; pieces take ops and head counts as given."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from families import LAYERS, VOCAB, PackedRun, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaAttention

from llamatelemetry.loading.gguf_rows import ARCHITECTURES
from llamatelemetry.models.families import FAMILIES, Family
from llamatelemetry.models.opset import NATIVE, REFERENCE
from llamatelemetry.models.patching import patch, unpatch
from llamatelemetry.models.pieces.attention import Attention
from llamatelemetry.models.spec import LayerSpec, unread_field

# One of each way to be other than Llama.
_OF_EVERY_KIND = [
    "llama",
    "mistral",
    "glm4",
    "phi3",
    "smollm3",
    "gemma2",
    "gemma3",
    "olmo2",
    "cohere2",
    "starcoder2",
    "gpt_neox",
    "gpt2",
    "opt",
    "gpt_oss",
]


def set_spec(monkeypatch, model, **fields):
    """The family of this model gets another spec."""
    name = type(model).__name__
    row = FAMILIES.get(name, Family(model.config.model_type, LayerSpec()))
    monkeypatch.setitem(FAMILIES, name, replace(row, spec=replace(row.spec, **fields)))


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "sliding_window", 7),
        ("llama", "residual_multiplier", 0.5),
        ("llama", "attn_logit_softcapping", 30.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "num_local_experts", 8),
        ("llama", "attention_chunk_size", 16),
        ("llama", "no_rope_layers", [1, 0]),
        ("llama", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen3", "layer_types", ["full_attention", "linear_attention"]),
        ("granite", "logit_scale", 0.1),
    ],
)
def test_a_config_field_that_the_spec_ignores_is_refused(family, field, value, device):
    model = tiny_model(family, device)
    setattr(model.config, field, value)
    with pytest.warns(UserWarning, match=rf"config\.{field} must be .* got"):
        report = patch(model)
    assert not report.replaced


def test_neutral_fields_are_read_by_every_spec():
    model = tiny_model("llama")
    model.config.sliding_window = None
    model.config.residual_multiplier = 1.0
    model.config.num_experts = 0
    model.config.layer_types = ["full_attention"] * LAYERS
    assert unread_field(LayerSpec(), model.config) is None


class CappedAttention(LlamaAttention):
    """Llama's with a softcap, small enough to matter."""

    cap = 2.0

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        cache = kwargs.pop("cache", past_key_values)
        kwargs["softcap"] = self.cap
        return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)


def test_a_softcap_is_kept_in_both_ways_in(device, monkeypatch):
    model = tiny_model("llama", device)
    ids = torch.randint(VOCAB, (1, 9), device=device)
    uncapped = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.__class__ = CappedAttention
    with pytest.warns(UserWarning, match="self_attn: on random input it errs by"):
        patch(model)
    unpatch(model)
    set_spec(monkeypatch, model, softcap="cap")
    patch(model, strict=True)
    capped = model(ids).logits
    assert (capped - uncapped).abs().max() > 1e-2
    run = PackedRun(model, 1)
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        ours = run.step([ids[0, begin:end]])
        assert_close(ours, capped[:, end - 1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", _OF_EVERY_KIND)
def test_the_reference_ops_serve_in_place_of_ours(family, device):
    model = tiny_model(family, device)
    ids = torch.randint(VOCAB, (2, 9), device=device)
    before = model(ids).logits
    implementation = model.config._attn_implementation
    patch(model, strict=True, ops=REFERENCE)
    assert model.config._attn_implementation == implementation
    assert_close(model(ids).logits, before, atol=2e-5, rtol=1e-5)
    run = PackedRun(model, 2)
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        ours = run.step(list(ids[:, begin:end]))
        assert_close(ours, before[:, end - 1], atol=2e-5, rtol=1e-5)


def shard_of(attention, begin, end, fused):
    """Heads begin to end of the keys, and the queries that share them, as a tensor-parallel
    rank holds them."""
    shard = copy.deepcopy(attention)
    dim, group = attention.head_dim, attention.num_key_value_groups
    q = slice(begin * group * dim, end * group * dim)
    kv = slice(begin * dim, end * dim)
    if fused:
        rows = shard.qkv_proj.weight.data
        num_q = attention.o_proj.weight.shape[1]
        parts = rows.split([num_q, *[(rows.shape[0] - num_q) // 2] * 2])
        cut = [part[s] for part, s in zip(parts, (q, kv, kv), strict=True)]
        shard.qkv_proj.weight = nn.Parameter(torch.cat(cut), requires_grad=False)
    else:
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            linear = getattr(shard, name)
            linear.weight = nn.Parameter(linear.weight.data[rows].clone(), requires_grad=False)
    columns = shard.o_proj.weight.data[:, q].clone()
    shard.o_proj.weight = nn.Parameter(columns, requires_grad=False)
    return shard


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_head_counts_come_from_the_weights(family, device):
    """Shards of the heads, whose outputs an all-reduce adds, give what the whole gives."""
    model = tiny_model(family, device)
    attention, spec = model.model.layers[0].self_attn, FAMILIES[type(model).__name__].spec
    x = torch.randn(1, 9, model.config.hidden_size, device=device)
    angles = model.model.rotary_emb(x, torch.arange(9, device=device)[None])
    model.config._attn_implementation = "eager"
    causal = torch.full((9, 9), -torch.inf, device=device).triu(1)[None, None]
    call = {"position_embeddings": angles, "attention_mask": causal}
    whole, _ = attention(x, **call)
    shards = [shard_of(attention, *cut, family == "phi3") for cut in ((0, 1), (1, 3))]
    outputs = [Attention(shard, spec, model.config).forward(x, **call)[0] for shard in shards]
    assert_close(sum(outputs), whole)


def test_every_layer_reduces_twice(device):
    model = tiny_model("llama", device)
    shapes = []

    def all_reduce(x):
        shapes.append(tuple(x.shape))
        return x

    patch(model, ops=replace(NATIVE, all_reduce=all_reduce))
    shapes.clear()
    PackedRun(model, 1).step([torch.randint(VOCAB, (4,))])
    assert shapes == [(4, model.config.hidden_size)] * 2 * LAYERS


def test_models_of_gguf_files_are_those_that_patch_knows():
    rows = [row for rows in ARCHITECTURES.values() for row in rows]
    known = {family.model_type for family in FAMILIES.values()}
    assert {row.model_type for row in rows} - known == {"ministral3"}  # scales by position
