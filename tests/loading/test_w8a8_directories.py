"""Directories whose linears take quantised rows: W8A8Linear where a device is fast at it."""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from directories import change, tiny_tokenizer
from families import tiny_model
from quantised_directories import KINDS, linears_of, write_quantised
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.loading.find import load_model
from llamatelemetry.models.patching import patch, unpatch
from llamatelemetry.ops import QuantFormat, repack
from llamatelemetry.quantization import w8a8
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.modules import QuantLinear, expand
from llamatelemetry.quantization.w8a8 import W8A8Linear, quantize_w8a8

IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])
KEPT = {"save_original_format": False}
STATIC = {"activation_scheme": "static"}
UNUSED = r"a static activation scheme\) are not used; their weights alone are in 8 bits$"
BYTES = {
    "int8": dataclasses.replace(KINDS["int8-column"], rows=True),
    "float8": dataclasses.replace(KINDS["float8-column"], rows=True),
}


@pytest.fixture
def fast(monkeypatch):
    """As on a Hopper GPU: the ops are the same everywhere."""
    monkeypatch.setattr(w8a8, "beats_weights_alone", lambda takes, device: True)


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


def wide_model():
    """Of whole blocks of 128 x 128."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    with torch.inference_mode(False):
        return LlamaForCausalLM(config).eval()


def test_blocks(tmp_path, device, fast):
    """Of 128 x 128, as DeepSeek's and Qwen's directories have them."""
    kind = dataclasses.replace(KINDS["float8-blocks"], group=128)
    with torch.inference_mode(False):
        theirs = write_quantised(tmp_path, wide_model(), kind).to(device)
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


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", "amx"])
def test_on_the_cpu(path, monkeypatch, level):
    """Of e4m3 at AVX2 quantised rows are faster; elsewhere weights alone are in 8 bits."""
    monkeypatch.setattr(w8a8, "cpu_isa", lambda: level)
    is_float8 = "float" in quantization(path)["format"]
    expected = W8A8Linear if is_float8 and level == "avx2" else GroupLinear
    assert kinds_of(load_model(path, dtype=torch.float32).model) == {expected}
    exact = load_model(path, dtype=torch.float32, exact=True).model
    assert kinds_of(exact) == {GroupLinear}


def test_blocks_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(w8a8, "cpu_isa", lambda: "avx2")
    kind = dataclasses.replace(KINDS["float8-blocks"], group=128)
    write_quantised(tmp_path, wide_model(), kind)
    assert kinds_of(load_model(tmp_path, dtype=torch.float32).model) == {GroupLinear}


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


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor(0.0), None])
@pytest.mark.parametrize("kind", ["float8-tensor", "float8-blocks", "float8-column", "int8-column"])
def test_static_inputs_are_said_not_to_be_used(tmp_path, fast, kind, scale):
    """With a scale for each input, with one that is none, and without."""
    theirs = write_quantised(
        tmp_path, tiny_model("llama"), dataclasses.replace(KINDS[kind], rows=True)
    )
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if scale is not None:
        tensors |= {f"{name}.input_scale": scale.clone() for name, _ in linears_of(theirs)}
    save_file(tensors, file, metadata={"format": "pt"})
    said = quantization(tmp_path)
    if said["quant_method"] == "fp8":
        said |= STATIC
    else:
        said["config_groups"]["group_0"]["input_activations"] |= {"dynamic": False}
    change(tmp_path / "config.json", quantization_config=said)
    with pytest.warns(UserWarning, match=UNUSED):
        model = load_model(tmp_path, dtype=torch.float32, exact=True).model
    assert kinds_of(model) == {GroupLinear}
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "named"),
    [("mixtral", {}), ("qwen3_moe", {}), ("olmoe", {}), ("granitemoe", KEPT), ("gpt_neox", KEPT)],
)
def test_what_is_saved_is_read(tmp_path, fast, family, named):
    """Of experts, which stay dense; of models that transformers writes under other names, refused
    where it is known."""
    model = quantize_w8a8(tiny_model(family))
    tiny_tokenizer().save_pretrained(tmp_path)
    if named:
        with pytest.raises(RuntimeError, match=r"under other names, as .* save_original_format="):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))
    model.save_pretrained(tmp_path, **named)
    loaded = load_model(tmp_path, dtype=torch.float32).model
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_rows_that_are_no_whole_blocks(tmp_path):
    """Of 48 columns, which weights in 8 bits alone have no layout for, on any device."""
    model = quantize_w8a8(tiny_model("qwen2_moe"))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32).model
    down = loaded.model.layers[0].mlp.shared_expert.down_proj
    assert (type(down), down.in_features) == (W8A8Linear, 48)
    error = (loaded(IDS).logits - model(IDS).logits).norm()
    assert error < 0.1 * model(IDS).logits.norm()


def test_formats_that_no_config_names_are_not_saved(tmp_path):
    """Not silently, for they would be read as what they are not; once they are alike they are."""
    model = quantize_w8a8(tiny_model("qwen2"), skip=("lm_head", "mlp"))
    model = copy.deepcopy(quantize_w8a8(model, "fp8"))
    with pytest.raises(RuntimeError, match=r"one format, got torch.float8_e4m3fn and torch.int8"):
        model.save_pretrained(tmp_path)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, layer.mlp.get_submodule(name).dense(torch.float32))
    quantize_w8a8(model).save_pretrained(tmp_path)
    assert quantization(tmp_path)["format"] == "int-quantized"
    tied = pack_quantised(tiny_model("qwen2"), "model.layers.0.self_attn.q_proj")
    with pytest.raises(RuntimeError, match=r"all that is quantised, got .*q_proj, a QuantLinear"):
        quantize_w8a8(tied).save_pretrained(tmp_path)
    assert not hasattr(tied.config, "quantization_config")
    expand(tied, torch.float32)
    tied.save_pretrained(tmp_path)  # dense again, and said to be
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def pack_quantised(model, name):
    """The model with one linear of a GGUF file."""
    n, k = model.get_submodule(name).weight.shape
    rows = torch.zeros(n, QuantFormat.Q4_0.row_bytes(k), dtype=torch.uint8)
    model.set_submodule(name, QuantLinear(repack(rows, QuantFormat.Q4_0), QuantFormat.Q4_0, n))
    return model
