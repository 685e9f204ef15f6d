"""W8A8Linear and quantize_w8a8: accuracy on layers and on a tiny model, what stays, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.ops import quantize_rows, reference, scaled_linear
from llamatelemetry.quantization.w8a8 import (
    MOST_OWN_ROWS,
    W8A8Linear,
    is_fast_on,
    quantize_w8a8,
)

KINDS = {"int8": 0.02, "fp8": 0.05}  # of a random layer's result, as a share of its norm


def tiny_llama(tied=False):
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=199, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("kind", "most"), KINDS.items())
def test_a_layer(device, dtype, kind, most):
    linear = nn.Linear(96, 40).to(device, dtype)
    x = torch.randn(3, 5, 96, device=device).to(dtype)
    layer = W8A8Linear.of(linear, kind)
    ours, theirs = layer(x), linear(x)
    assert ours.dtype == dtype
    assert (ours - theirs).float().norm() < most * theirs.float().norm()
    q, scales = quantize_rows(x, layer.weight.dtype)
    assert torch.equal(layer.multiply(q, scales, dtype), ours)
    assert layer.weight.nbytes == 96 * 40


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 64, 65])
def test_many_rows_of_e4m3(rows, monkeypatch):
    """By torch's product on Hopper, from 65 rows on."""
    calls, torchs = [], torch._scaled_mm
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *args, **kwargs: calls.append(1) or torchs(*args, **kwargs)
    )
    linear = nn.Linear(256, 48).to("cuda", torch.bfloat16)
    layer = W8A8Linear.of(linear, "fp8")
    x = torch.randn(rows, 256, device="cuda").bfloat16()
    q, scales = quantize_rows(x, torch.float8_e4m3fn)
    args = (q, scales, layer.weight, layer.weight_scales, torch.bfloat16, linear.bias)
    expected = reference.scaled_linear(*args)
    for out in (layer.multiply(q, scales, torch.bfloat16), scaled_linear(*args)):
        torch.testing.assert_close(out, expected, rtol=0.01, atol=0.01)
    assert len(calls) == (rows > MOST_OWN_ROWS and is_fast_on(q.device))


@pytest.mark.parametrize(("kind", "most"), KINDS.items())
def test_a_models_logits(device, kind, most):
    model = tiny_llama().to(device)
    ids = torch.arange(2 * 24, device=device).view(2, 24) * 7 % 199
    expected = model(ids).logits
    kept = model.lm_head
    assert quantize_w8a8(model, kind) is model
    assert model.lm_head is kept
    assert sum(isinstance(part, W8A8Linear) for part in model.modules()) == 2 * 7
    ours = model(ids).logits
    assert (ours - expected).norm() < 2 * most * expected.norm()
    agree = (ours.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agree > 0.8


def test_what_stays():
    model = quantize_w8a8(tiny_llama(tied=True), skip=("down_proj",))
    assert type(model.lm_head) is nn.Linear  # tied to the embedding
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is W8A8Linear
    alone = nn.Linear(8, 8)
    assert type(quantize_w8a8(alone)) is W8A8Linear
    state = quantize_w8a8(nn.Sequential(nn.Linear(8, 8))).state_dict()
    assert set(state) == {"0.weight", "0.weight_scale", "0.bias"}


def test_refusals():
    with pytest.raises(RuntimeError, match=r"kind must be one of \['fp8', 'int8'\], got 'int4'"):
        quantize_w8a8(nn.Linear(8, 8), "int4")
    with pytest.raises(RuntimeError, match=r"model must hold an nn\.Linear outside skip"):
        quantize_w8a8(nn.ReLU())
