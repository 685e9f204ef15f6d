"""Linears side by side in a traced graph: one launch, and always the weights that are there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import StaticCache
from twins import ids_of, twins

from llamatelemetry.models.hf_masks import KeyMask, key_mask
from llamatelemetry.models.pieces.merge import merge_linears
from llamatelemetry.models.pieces.side_by_side import linear_side_by_side


@pytest.fixture(autouse=True)
def _no_inference_mode():
    with torch.inference_mode(False), torch.no_grad():
        yield


def linears_of(bias, device, rows=(48, 48)):
    return [nn.Linear(32, n, bias=bias, device=device).requires_grad_(False) for n in rows]


def called(x, linears, activation=None):
    biases = [one.bias for one in linears if one.bias is not None]
    return linear_side_by_side(x, [one.weight for one in linears], biases, activation)


@pytest.mark.parametrize("is_merged", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_values(rows, bias, is_merged, device):
    linears, x = linears_of(bias, device), torch.randn(2, rows, 32, device=device)
    want = torch.cat([one(x) for one in linears], -1)
    if is_merged:
        assert merge_linears(linears) is not None
    assert_close(called(x, linears), want)
    gate, up = (one(x) for one in linears)
    assert_close(called(x, linears, "silu_and_mul"), nn.functional.silu(gate) * up)


@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
def test_opcheck(activation, device):
    linears, x = linears_of(True, device), torch.randn(3, 32, device=device)
    weights, biases = [one.weight for one in linears], [one.bias for one in linears]
    for given in (biases, []):
        arguments = (x, weights, given, activation)
        torch.library.opcheck(linear_side_by_side, arguments)


def test_merged_weights_are_not_copied(device, monkeypatch):
    linears, x = linears_of(False, device), torch.randn(1, 32, device=device)
    merge_linears(linears)
    monkeypatch.setattr(torch, "cat", None)
    called(x, linears)


def test_a_decode_step_is_one_graph_of_our_ops(device):
    """Over a static cache that holds no padding: nothing is sorted, and no product is torch's."""
    ours, theirs, _ = twins(device)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    got, want = (steps(call, ours, device) for call in (compiled, theirs))
    assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert len(graphs) == 1
    # The angles come before the layers, the vocabulary projection after them.
    layers = graphs[0].partition("rms_norm")[2].partition("lm_head")[0]
    for op in ("linear_side_by_side", "rotary_embedding_", "paged_attention"):
        assert op in layers, op
    for torchs in ("sort", "_C._nn.linear", "scaled_dot_product", "torch.cat"):
        assert torchs not in layers, torchs


def steps(call, model, device):
    """Logits of three tokens after a prompt, as generate calls a model that it compiles."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = ids_of(device)
    seen = torch.ones_like(ids)
    model(ids, attention_mask=seen, past_key_values=cache)
    outs = []
    for i in range(3):
        seen = torch.cat([seen, seen.new_ones(1, 1)], 1)
        ids = torch.cat([ids, ids[:, i : i + 1]], 1)
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, past_key_values=cache, attention_mask=seen, use_cache=True
        )
        outs.append(call(**inputs).logits)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("on_device", [True, False])
def test_a_mask_that_does_not_reach_a_caches_end(on_device, device):
    """It hides what causality hides already, but where a query stands past its end."""
    seen = torch.ones(2, 6, dtype=torch.bool, device=device)
    for offset, padded, is_kept in ((5, False, True), (5, True, False), (6, False, False)):
        mask = seen.clone()
        mask[0, 1] = not padded
        start = torch.tensor(offset, device=device) if on_device else offset
        made = key_mask(2, 1, 16, start, 0, attention_mask=mask, device=torch.device(device))
        assert isinstance(made, KeyMask)
        assert (made.key_tokens is None) == is_kept
        slots = torch.arange(16, device=device)
        want = (slots <= offset) & nn.functional.pad(mask, (0, 10))
        assert torch.equal(made.dense()[:, 0, 0], want)
