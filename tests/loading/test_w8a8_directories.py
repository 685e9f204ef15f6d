"""Directories whose linears take quantised rows: W8A8Linear where a device is fast at it."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from directories import change, tiny_tokenizer
from families import tiny_model
from quantised_directories import KINDS, linears_of, write_quantised
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.loading.find import load_model
from llamatelemetry.models.patching import patch, unpatch
from llamatelemetry.quantization import w8a8
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.w8a8 import W8A8Linear, quantize_w8a8

IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])
STATIC = {"activation_scheme": "static"}
UNUSED = r"a static activation scheme\) are not used$"
BYTES = {
    "int8": dataclasses.replace(KINDS["int8-column"], rows=True),
    "float8": dataclasses.replace(KINDS["float8-column"], rows=True),
}


@pytest.fixture
def fast(monkeypatch):
    """As on a Hopper GPU: the ops are the same everywhere."""
    monkeypatch.setattr(w8a8, "is_fast_on", lambda device: True)


@pytest.fixture(params=BYTES)
def path(request, tmp_path):
    write_quantised(tmp_path, tiny_model("llama_bias"), BYTES[request.param])
    return tmp_path


def quantization(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def kinds_of(model):
    return {type(linear) for name, linear in model.named_modules() if name.endswith("_proj")}


def is_w8a8(part):
    return type(part) is W8A8Linear


def test_weights_and_logits(path, device, fast):
    """Logits are those of the dense weights, but for rows rounded to bytes."""
    dense = load_model(path, device=device, dtype=torch.float32, exact=True).model
    assert kinds_of(dense) == {GroupLinear}
    model = load_model(path, device=device, dtype=torch.float32).model
    assert kinds_of(model) == {W8A8Linear}
    for name, linear in linears_of(dense):
        ours = model.get_submodule(name)
        assert torch.equal(ours.dense(torch.float32).weight, linear.dense(torch.float32).weight)
    ids = IDS.to(device)
    expected = dense(ids).logits
    ours = model(ids).logits
    assert 0 < (ours - expected).norm() < 0.1 * expected.norm()
    assert patch(model).refused == {}
    assert (model(ids).logits - ours).norm() < 0.02 * expected.norm()


def test_blocks(tmp_path, device, fast):
    """Of 128 x 128, as DeepSeek's and Qwen's directories have them."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    kind = dataclasses.replace(KINDS["float8-blocks"], group=128)
    with torch.inference_mode(False):
        theirs = write_quantised(tmp_path, LlamaForCausalLM(config).eval(), kind).to(device)
    model = load_model(tmp_path, device=device, dtype=torch.float32).model
    assert kinds_of(model) == {W8A8Linear}
    for name, linear in linears_of(theirs):
        ours = model.get_submodule(name)
        assert ours.takes == (torch.float8_e4m3fn, 128)
        assert torch.equal(ours.dense(torch.float32).weight, linear.weight)
    ids = IDS.to(device)
    expected = theirs(ids).logits
    assert 0 < (model(ids).logits - expected).norm() < 0.1 * expected.norm()
    assert patch(model).refused == {}
    assert (model(ids).logits - expected).norm() < 0.1 * expected.norm()
    change(tmp_path / "config.json", quantization_config=quantization(tmp_path) | STATIC)
    with pytest.warns(UserWarning, match=UNUSED):
        assert kinds_of(load_model(tmp_path, device=device).model) == {GroupLinear}


def test_elsewhere(path):
    assert kinds_of(load_model(path, dtype=torch.float32).model) == {GroupLinear}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_saved_and_loaded(tmp_path, fast, kind):
    """What save_pretrained writes, patched or not, is what the linears are; heads stay dense."""
    model = quantize_w8a8(tiny_model("qwen2"), kind)
    codes = {name: part.weight.clone() for name, part in model.named_modules() if is_w8a8(part)}
    patch(model)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = quantization(tmp_path)
    assert found["format"] == {"int8": "int-quantized", "fp8": "float-quantized"}[kind]
    assert found["ignore"] == ["lm_head"]
    loaded = load_model(tmp_path, dtype=torch.float32).model
    for name, weight in codes.items():
        ours = loaded.get_submodule(name)
        assert torch.equal(ours.weight.view(torch.int8), weight.view(torch.int8))
        assert torch.equal(ours.weight_scales, model.get_submodule(name).weight_scales)
    assert loaded.config.quantization_config == found  # and could be saved again
    loaded.load_state_dict(loaded.state_dict())
    unpatch(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "inputs", [{"dynamic": False}, {"strategy": "tensor"}, {"num_bits": 4}, {"symmetric": False}]
)
def test_other_inputs_stay_weights_alone(path, fast, inputs):
    """Static scales, or one for all rows: not what W8A8Linear computes."""
    group = quantization(path)
    group["config_groups"]["group_0"]["input_activations"] |= inputs
    change(path / "config.json", quantization_config=group)
    says = pytest.warns(UserWarning, match=UNUSED) if "dynamic" in inputs else nullcontext()
    with says:
        assert kinds_of(load_model(path, dtype=torch.float32).model) == {GroupLinear}
