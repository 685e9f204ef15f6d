"""Models of W8A8 linears: moved and converted, patched, and which linears stay."""

from __future__ import annotations

import copy

import pytest
import torch
from families import LAYERS, OpCounter, PackedRun, tiny_model
from torch import nn

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.patching import patch, unpatch
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


def blocks_in_place(model):
    """W8A8 linears of e4m3 in blocks in the place of a model's, its head's aside."""
    for name, part in list(model.named_modules()):
        if type(part) is nn.Linear and name != "lm_head":
            n, k = part.weight.shape
            if n == 160:  # gate and up are one product where whole blocks are theirs
                n = 256
            k = 256 if k == 160 else k
            scales = torch.rand(-(-n // 128), -(-k // 128), device=part.weight.device) * 0.004
            weight = torch.randn(n, k, device=part.weight.device) * 20
            codes = weight.to(torch.float8_e4m3fn)
            model.set_submodule(name, W8A8Linear(codes, scales, part.bias, 128))
    return model


def test_blocks_that_do_not_end_with_gate():
    model = tiny_model("llama")
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            n, k = (448, 288) if name != "down_proj" else (288, 448)
            scales = torch.full((-(-n // 128), -(-k // 128)), 0.004)
            codes = torch.zeros(n, k).to(torch.float8_e4m3fn)
            setattr(layer.mlp, name, W8A8Linear(codes, scales, None, 128))
    with pytest.warns(UserWarning, match="whole blocks of 128 rows"):
        refused = patch(model).refused
    sentence = "must be whole blocks of 128 rows to become one linear, got 448"
    assert sentence in refused["model.layers.0.mlp"]


MAKERS = {
    "int8": quantize_w8a8,
    "fp8": lambda model: quantize_w8a8(model, "fp8"),
    "blocks": blocks_in_place,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "stablelm_parallel"])
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_patch(device, family, maker):
    """Logits packed, patched and module by module: a rounding may move codes by a step."""
    model = maker(tiny_model(family, device))
    ids = torch.arange(12, device=device).view(2, 6) * 5
    expected = model(ids).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = patch(model)
    assert not report.refused
    ours = model(ids).logits
    assert (ours - expected).norm() < 0.02 * expected.norm()
    packed = PackedRun(model, 2).step(list(ids))
    assert (packed - expected[:, -1]).norm() < 0.02 * expected.norm() / 6**0.5
    unpatch(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), state[name].float())
        assert value.untyped_storage().nbytes() == value.nbytes
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_no_kernel_quantises_alone_but_the_output_projections(device):
    model = quantize_w8a8(tiny_model("llama", device))
    patch(model)
    ids = torch.arange(6, device=device)[None]
    with OpCounter() as counter:
        PackedRun(model, 1).step(list(ids))
    calls = {name.partition("::")[2]: count for name, count in counter.calls.items()}
    assert calls["quantize_rows"] == LAYERS  # of what attention gives
    assert calls["rms_norm_quantize"] == 1
    assert calls["fused_add_rms_norm_quantize_"] == 2 * LAYERS - 1
    assert calls["silu_and_mul_quantize"] == LAYERS
    assert calls["scaled_linear"] == 4 * LAYERS  # q, k and v as one, and gate and up
    assert calls["fused_add_rms_norm_"] == 1  # before the head, which is not quantised


@torch.no_grad()
def test_a_copy_packs_by_itself(device):
    """Its pieces are bound to its own modules at their first call."""
    model = quantize_w8a8(tiny_model("llama", device))
    patch(model)
    ids = torch.arange(6, device=device)[None]
    with torch.inference_mode(False):
        twin = copy.deepcopy(model)
    assert torch.equal(PackedRun(twin, 1).step(list(ids)), PackedRun(model, 1).step(list(ids)))


@torch.no_grad()
def test_patch_finds_what_the_rounding_of_rows_would_hide(device):
    model = quantize_w8a8(tiny_model("llama", device))
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.02
        forward = type(layer.mlp).forward
        layer.mlp.forward = lambda x, mlp=layer.mlp, forward=forward: forward(mlp, x) * 1.005
    with pytest.warns(UserWarning, match="stay as they were"):
        report = patch(model)
    assert report.replaced["Attention"] == LAYERS  # which reads its scale
    assert all(name.endswith(".mlp") or name.count(".") == 2 for name in report.refused)
    assert not report.replaced["GatedMlp"]


def test_text(device):
    """The engine's and the batcher's text is that of transformers' modules."""
    model = quantize_w8a8(tiny_model("llama", device).to(torch.float32))
    prompt = [5, 17, 3, 40, 8]
    ids = torch.tensor([prompt], device=device)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    expected = ids[0, len(prompt) :].tolist()
    patch(model)
    generator = TokenGenerator(model)
    assert [row[0] for row in generator.generate([prompt], [GREEDY], 12)] == expected
    assert generator.decode_mode == ("recorded" if device.type == "cpu" else "graph")
    batcher = ContinuousBatching(2, model)
    handles = [batcher.submit(prompt, GREEDY, 12) for _ in range(2)]
    assert [handle.result().token_ids for handle in handles] == [expected] * 2


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
