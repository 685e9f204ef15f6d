"""Directories of GPTQ, AWQ and compressed-tensors: packed, and the weights that codes stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from directories import change
from families import tiny_model
from quantised_directories import KINDS, linears_of, write_mxfp4, write_quantised
from safetensors.torch import load_file, save_file

from llamatelemetry.cli.main import main
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.loading.find import ModelFileError, load_model
from llamatelemetry.models.patching import patch
from llamatelemetry.quantization.experts import QuantExperts
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.modules import expand

IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def path(tmp_path):
    write_quantised(tmp_path, tiny_model("llama"), KINDS["gptq"])
    return tmp_path


def refusal(path):
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_and_logits(tmp_path, kind, device):
    """Weights bit for bit; logits as of the same weights in float32 in transformers."""
    theirs = write_quantised(tmp_path, tiny_model("mistral"), kind).to(device)
    model = load_model(tmp_path, device=device, dtype=torch.float32, exact=True).model
    for name, linear in linears_of(theirs):
        ours = model.get_submodule(name)
        assert type(ours) is GroupLinear
        assert torch.equal(ours.dense(torch.float32).weight, linear.weight)
    ids = IDS.to(device)
    expected = theirs(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    report = patch(model)
    assert report.refused == {}
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_mxfp4(tmp_path, device):
    theirs = write_mxfp4(tmp_path, tiny_model("gpt_oss")).to(device)
    model = load_model(tmp_path, device=device, dtype=torch.float32, exact=True).model
    experts = model.model.layers[0].mlp.experts
    assert type(experts) is QuantExperts
    dense = experts.dense(torch.float32)
    for part in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(dense, part), getattr(theirs.model.layers[0].mlp.experts, part))
    ids = IDS.to(device)
    model = load_model(tmp_path, device=device, dtype=torch.float32, exact=True).model
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_bias", "phi3", "llama"])
def test_families(tmp_path, family):
    """Biases, fused projections, and an embedding that is the head too."""
    theirs = write_quantised(tmp_path, tiny_model(family), KINDS["gptq-act-order"])
    model = load_model(tmp_path, dtype=torch.float32, exact=True).model
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)
    expand(model, torch.float32)
    assert not any(type(module) is GroupLinear for module in model.modules())
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order"])
def test_merged_and_generated(tmp_path, name):
    """q, k and v run as one linear; the engine's greedy tokens are those of dense weights."""
    theirs = write_quantised(tmp_path, tiny_model("llama"), KINDS[name])
    loaded = load_model(tmp_path, dtype=torch.float32, exact=True)
    ours = InferenceEngine(loaded).infer(IDS[0].tolist(), 12, temperature=0.0)
    attention = loaded.model.model.layers[0].self_attn
    weights = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    dense = InferenceEngine(dataclasses.replace(loaded, model=theirs))
    assert ours.text == dense.infer(IDS[0].tolist(), 12, temperature=0.0).text != ""


def test_scales_keep_their_dtype(path):
    model = load_model(path, dtype=torch.float32, exact=True).model
    layer = model.model.layers[0].mlp.down_proj
    scales = layer.scales.clone()
    model.to(torch.bfloat16).to(torch.float32)
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.scales, scales)


def test_the_command(path, capsys):
    assert main(["generate", "hello", "--model", str(path), "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out


def test_shards(path):
    whole = load_file(path / "model.safetensors")
    names = sorted(whole)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: whole[name] for name in names if places[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    before = load_model(path).model(IDS).logits
    (path / "model.safetensors").unlink()
    change(path / "model.safetensors.index.json", metadata={}, weight_map=places)
    assert torch.equal(load_model(path).model(IDS).logits, before)


def test_refusals(path):
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    for fields, sentence in [
        ({"bits": 3}, "quantization_config: bits must be 4 or 8, got 3"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ's version must be gemm, got gemv"),
        ({"quant_method": "compressed-tensors"}, "must be pack-quantized, got None"),
    ]:
        change(path / "config.json", quantization_config=quantization | fields)
        assert sentence in refusal(path)
    change(path / "config.json", quantization_config=quantization)
    whole = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    for change_one, sentence in [
        (lambda t: t.pop(f"{name}.qzeros"), f"{name}: qzeros is missing"),
        (lambda t: t.update({f"{name}.scales": t[f"{name}.scales"][:4]}), "alike, got (160, 4)"),
        (
            lambda t: t.update({f"{name}.qweight": torch.ones(2, 2)}),
            "must be two-dimensional int32",
        ),
        (
            lambda t: t[f"{name}.g_idx"].zero_(),
            f"{name}: g_idx must name each of 9 groups 32 times",
        ),
        (lambda t: t.pop("model.norm.weight"), "the weights hold no model.norm.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            "model.norm.weight must be (288,)",
        ),
    ]:
        tensors = {key: value.clone() for key, value in whole.items()}
        change_one(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        assert sentence in refusal(path)
