"""save_pretrained of models whose weights alone are quantised: read again, or refused."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import test_bitsandbytes as bits
import test_quantised_experts as experts
import torch
from directories import tiny_tokenizer
from families import tiny_model
from gguf_models import write_model
from quantised_directories import KINDS, write_mxfp4, write_quantised
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.loading.find import load_model
from llamatelemetry.models.patching import patch
from llamatelemetry.quantization import w8a8
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.w8a8 import W8A8Linear

IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])
ROWS = {
    f"{name}-rows": dataclasses.replace(KINDS[name], rows=True)
    for name in ("int8-column", "float8-column")
}
WRITTEN = {
    "gptq": "pack-quantized",
    "awq": "pack-quantized",
    "packed": "pack-quantized",
    "int8-column-rows": "int-quantized",
    "int8-column": "pack-quantized",
    "float8": "float-quantized",
}


@pytest.fixture(autouse=True)
def weights_alone(monkeypatch):
    """As at the CPU levels where linears stay GroupLinears, whichever this one is."""
    monkeypatch.setattr(w8a8, "beats_weights_alone", lambda takes, device: False)


def loaded(path, **options):
    return load_model(path, dtype=torch.float32, **options).model


def saved(model, path, **named):
    model.save_pretrained(path, **named)
    tiny_tokenizer().save_pretrained(path)
    return json.loads((path / "config.json").read_text())["quantization_config"]


def assert_twins(ours, theirs):
    """Bit for bit, whatever a tensor's dtype."""
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        as_bytes = [one.contiguous().flatten().view(torch.uint8) for one in (found[name], value)]
        assert torch.equal(*as_bytes), name
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("kind", KINDS | ROWS)
def test_what_is_saved_is_read(tmp_path, kind):
    write_quantised(tmp_path / "from", tiny_model("llama_bias"), (KINDS | ROWS)[kind])
    model = loaded(tmp_path / "from")
    twin = copy.deepcopy(model)
    assert any(isinstance(part, GroupLinear) for part in model.modules())
    found = saved(model, tmp_path / "to")
    assert found["quant_method"] == "compressed-tensors"
    wanted = WRITTEN.get(kind) or next(w for k, w in WRITTEN.items() if kind.startswith(k))
    assert (found["format"], found["ignore"]) == (wanted, ["lm_head"])
    inputs = found["config_groups"]["group_0"]["input_activations"]
    assert (inputs is not None) == (kind in ROWS)
    assert not hasattr(model.config, "quantization_config")
    again = loaded(tmp_path / "to")
    assert_twins(again, twin)
    patch(again)  # whose linears are views of merged ones
    assert saved(again, tmp_path / "patched") == found
    assert_twins(loaded(tmp_path / "patched"), twin)


@pytest.mark.parametrize("kind", ROWS)
def test_linears_of_two_classes_share_a_format(tmp_path, kind):
    """On the CPU those with whole blocks of 32 are GroupLinears, the others W8A8Linears."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=100, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    with torch.inference_mode(False):
        write_quantised(tmp_path / "from", LlamaForCausalLM(config).eval(), ROWS[kind])
    model = loaded(tmp_path / "from")
    kinds = {type(part) for part in model.modules()}
    assert {GroupLinear, W8A8Linear} <= kinds
    found = saved(model, tmp_path / "to")
    assert (found["format"], found["ignore"]) == (WRITTEN.get(kind, "float-quantized"), ["lm_head"])
    assert model.config.quantization_config == found  # as of W8A8Linears alone
    assert_twins(loaded(tmp_path / "to"), model)
    patch(model)
    assert saved(model, tmp_path / "patched") == found
    assert_twins(loaded(tmp_path / "patched"), loaded(tmp_path / "from"))


@pytest.mark.parametrize("other", ["int8-column", "float8-column-rows"])
def test_linears_of_two_formats_are_not_saved(tmp_path, other):
    write_quantised(tmp_path / "from", tiny_model("llama"), (KINDS | ROWS)[other])
    model, name = loaded(tmp_path / "from"), "model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(name).dense(torch.float32)
    model.set_submodule(name, W8A8Linear.of(linear))
    with pytest.raises(RuntimeError, match=r"or of the format of the GroupLinears beside them"):
        model.save_pretrained(tmp_path / "to")


def test_blocks_as_deepseeks(tmp_path):
    """Of 128 x 128 with inputs in blocks too: as they came, for readers that have no other."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    kind = dataclasses.replace(KINDS["float8-blocks"], group=128)
    with torch.inference_mode(False):
        write_quantised(tmp_path / "from", LlamaForCausalLM(config).eval(), kind)
    model = loaded(tmp_path / "from")
    found = saved(model, tmp_path / "to")
    assert (found["quant_method"], found["weight_block_size"]) == ("fp8", [128, 128])
    assert_twins(loaded(tmp_path / "to"), model)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tables_of_bitsandbytes(tmp_path, kind, nested):
    make = lambda linear: bits.four_bits(linear, kind, nested, 32)  # noqa: E731
    bits.write(tmp_path / "from", tiny_model("qwen2"), make)
    model = loaded(tmp_path / "from")
    found = saved(model, tmp_path / "to")
    assert (found["load_in_4bit"], found["bnb_4bit_quant_type"]) == (True, kind)
    assert_twins(loaded(tmp_path / "to"), model)


def test_bytes_of_bitsandbytes(tmp_path):
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    bits.write(tmp_path / "from", tiny_model("llama"), bits.eight_bits, config)
    model = loaded(tmp_path / "from")
    assert saved(model, tmp_path / "to")["format"] == "pack-quantized"
    assert_twins(loaded(tmp_path / "to"), model)


@pytest.mark.parametrize("name", ["gguf", "mxfp4", "experts"])
@torch.no_grad()
def test_packed_files_are_not_saved_as_directories(tmp_path, name):
    """They would not be read again; their dense weights are."""
    path, kind = tmp_path / "from", "QuantExperts"
    if name == "gguf":
        path, kind = tmp_path / "from.gguf", "QuantEmbedding"
        write_model(path)
    elif name == "mxfp4":
        write_mxfp4(path, tiny_model("gpt_oss"))
    else:
        kind = "LinearExperts"
        experts.write(path, tiny_model("mixtral"), KINDS["gptq"], "mixtral")
    model = loaded(path)
    with pytest.raises(RuntimeError, match=f"save_pretrained: .* is a {kind}, .*dequantize=True"):
        model.save_pretrained(tmp_path / "to")
    assert not (tmp_path / "to").exists()
    dense = loaded(path, dequantize=True)
    dense.save_pretrained(tmp_path / "to")
    tiny_tokenizer().save_pretrained(tmp_path / "to")
    again = loaded(tmp_path / "to")
    torch.testing.assert_close(again(IDS).logits, dense(IDS).logits)


def test_angles_that_no_config_has(tmp_path):
    """A directory would have others, in silence."""
    path = tmp_path / "model.gguf"
    factors = torch.linspace(1, 8, 16)
    write_model(path, extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors.numpy()))
    with pytest.raises(RuntimeError, match=r"rope_freqs.weight has no field .* keep its GGUF file"):
        loaded(path, dequantize=True).save_pretrained(tmp_path / "to")


def test_refusals(tmp_path):
    write_quantised(tmp_path / "from", tiny_model("llama"), KINDS["gptq"])
    model = loaded(tmp_path / "from")
    with pytest.raises(RuntimeError, match=r"^save_pretrained: state_dict must be left out"):
        model.save_pretrained(tmp_path / "to", state_dict=model.state_dict())
    write_quantised(tmp_path / "other", tiny_model("llama"), KINDS["float8-column"])
    other = loaded(tmp_path / "other")
    name = "model.layers.0.self_attn.q_proj"
    model.set_submodule(name, other.get_submodule(name))
    with pytest.raises(RuntimeError, match=r"must all be of one format, .* got E4M3 and S4"):
        model.save_pretrained(tmp_path / "to")
    write_quantised(tmp_path / "gpt", tiny_model("gpt_neox"), KINDS["awq"])
    model = loaded(tmp_path / "gpt")
    with pytest.raises(RuntimeError, match=r"under other names, as .* save_original_format=False"):
        model.save_pretrained(tmp_path / "to")
    saved(model, tmp_path / "to", save_original_format=False)
    assert_twins(loaded(tmp_path / "to"), model)


def test_groups_of_several_sizes(tmp_path):
    """Config groups then name their linears, as other readers look them up by name."""
    write_quantised(tmp_path / "from", tiny_model("llama"), KINDS["packed"])
    write_quantised(tmp_path / "other", tiny_model("llama"), KINDS["packed-asymmetric"])
    model, other = loaded(tmp_path / "from"), loaded(tmp_path / "other")
    name = "model.layers.0.mlp.down_proj"
    part = other.get_submodule(name)
    part.scales, part.zeros = part.scales[:, :1].contiguous(), part.zeros[:, :1].contiguous()
    model.set_submodule(name, part)
    groups = saved(model, tmp_path / "to")["config_groups"]
    assert [group["weights"]["group_size"] for group in groups.values()] == [32, None]
    assert groups["group_1"]["targets"] == [name]
    assert_twins(loaded(tmp_path / "to"), model)
