"""Models of W8A8 linears: moved and converted, patched, and which linears stay."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from torch import nn

from llamatelemetry.models.patching import patch
from llamatelemetry.quantization.w8a8 import W8A8Linear, quantize_w8a8


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes_and_scales_keep_their_dtypes(device, kind):
    layer = W8A8Linear.of(nn.Linear(64, 8), kind).to(device)
    weight, scales = layer.weight.clone(), layer.weight_scales.clone()
    layer.to(torch.bfloat16).double().half()
    assert layer.bias.dtype == torch.float16
    assert layer.weight.dtype == weight.dtype
    assert torch.equal(layer.weight.view(torch.int8), weight.view(torch.int8))
    assert layer.weight_scales.dtype == torch.float32
    assert torch.equal(layer.weight_scales, scales)
    x = torch.randn(2, 64, device=device, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer.to("meta").weight.dtype == weight.dtype


@torch.no_grad()
def test_patch_refuses_by_name(device):
    model = quantize_w8a8(tiny_model("llama", device))
    ids = torch.arange(6, device=device)[None]
    expected = model(ids).logits
    with pytest.warns(UserWarning, match="6 of 11 modules of this LlamaForCausalLM stay"):
        report = patch(model)
    assert dict(report.replaced) == {"RmsNorm": 5}
    start = "patch does not serve W8A8 linears, got one as"
    assert report.refused["model.layers.0.self_attn"] == f"{start} q_proj"
    assert report.refused["model.layers.1.mlp"] == f"{start} gate_proj"
    assert report.refused["model.layers.1"] == f"{start} self_attn.q_proj"
    assert len(report.refused) == 6
    # Another rounding of a norm may move codes of the rows after it by a step.
    assert (model(ids).logits - expected).norm() < 0.02 * expected.norm()


def stays(*skip):
    layer = nn.ModuleDict(
        {"attn": nn.ModuleDict({"q": nn.Linear(8, 8), "o": nn.Linear(8, 8)}), "qo": nn.Linear(8, 8)}
    )
    model = quantize_w8a8(nn.ModuleDict({"1": layer, "head": nn.Linear(8, 8)}), skip=skip)
    return [name for name, part in model.named_modules() if type(part) is nn.Linear]


def test_skip():
    assert stays() == []
    assert stays("head") == ["head"]
    assert stays("1.attn.q") == stays("q") == stays("attn.q") == ["1.attn.q"]
    assert stays("attn") == ["1.attn.q", "1.attn.o"]
    assert stays("1") == ["1.attn.q", "1.attn.o", "1.qo"]
    assert stays("hea", "att", "1.q", "attn.") == []
    with pytest.raises(RuntimeError, match="skip must be a collection of names, got 'lm_head'"):
        quantize_w8a8(nn.Linear(8, 8), skip="lm_head")
