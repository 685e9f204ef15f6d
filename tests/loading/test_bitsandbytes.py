"""Directories as bitsandbytes writes them: 4 bits, absmax plain and nested, int8 rows, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from directories import change, tiny_tokenizer
from families import tiny_model
from quantised_directories import linears_of
from safetensors.torch import load_file, save_file
from torch import nn

from llamatelemetry.loading.find import ModelFileError, load_model
from llamatelemetry.models.patching import patch
from llamatelemetry.quantization.bitsandbytes import read_four_bits, row_scales
from llamatelemetry.quantization.group_linear import GroupLinear

NF4_EXACT = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]  # of bitsandbytes' files
IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED_BLOCK = 256
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12


def four_bits(linear, kind, nested, block=64):
    """A linear's tensors of random codes; its weight becomes what they stand for."""
    n, k = linear.weight.shape
    tables = {"nf4": torch.tensor(NF4_EXACT), "fp4": torch.cat([FP4, 0 - FP4])}
    codes, table = torch.randint(16, (n * k,)), tables.get(kind, torch.rand(16))
    kind = "fp4" if kind == "fp4" else "nf4"
    parts = {"weight.quant_map": table}
    state = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [n, k]}
    blocks = -(-n * k // block)
    absmax = torch.rand(blocks) * 0.1
    if nested:
        bytes_, sizes = torch.randint(256, (blocks,)), torch.rand(-(-blocks // NESTED_BLOCK)) * 0.02
        parts["weight.absmax"] = bytes_.to(torch.uint8)
        parts["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        parts["weight.nested_absmax"] = sizes
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_offset": 0.05}
        each = sizes.repeat_interleave(NESTED_BLOCK)[:blocks]
        absmax = torch.linspace(-1, 1, 256)[bytes_] * each + 0.05
    else:
        parts["weight.absmax"] = absmax
    pairs = codes.view(-1, 2).to(torch.uint8)
    parts["weight"] = (pairs[:, 0] << 4 | pairs[:, 1])[:, None]
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = text
    linear.weight.data = (table[codes] * absmax.repeat_interleave(block)[: n * k]).view(n, k)
    return parts


def eight_bits(linear):
    n, k = linear.weight.shape
    codes = torch.randint(-127, 128, (n, k)).to(torch.int8)
    largest = torch.rand(n) * 0.2
    linear.weight.data = codes.float() * (largest / 127)[:, None]
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def write(path, model, make, config=CONFIG):
    model.config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tensors = dict(model.state_dict())
    for name, linear in linears_of(model):
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": value for part, value in make(linear).items()}
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    change(path / "config.json", quantization_config=config)
    return model


@pytest.mark.parametrize(
    ("kind", "nested", "block"),
    [("nf4", True, 32), ("nf4", False, 64), ("fp4", True, 32), ("other", False, 32)],
)
def test_four_bits(tmp_path, device, kind, nested, block):
    """The weights bit for bit, packed where rows are whole blocks of a known table's values."""
    make = lambda linear: four_bits(linear, kind, nested, block)  # noqa: E731
    theirs = write(tmp_path, tiny_model("qwen2"), make).to(device)
    model = load_model(tmp_path, device=device, dtype=torch.float32).model
    for name, linear in linears_of(theirs):
        ours = model.get_submodule(name)
        if kind == "other" or linear.in_features % block:
            assert type(ours) is nn.Linear
        else:
            assert type(ours) is GroupLinear
            assert ours.format == kind.upper()
            num_bytes = sum(tensor.nbytes for tensor in ours.buffers())
            assert num_bytes == linear.weight.numel() * (1 / 2 + 4 / block)
            ours = ours.dense(torch.float32)
        assert torch.equal(ours.weight, linear.weight)
    ids = IDS.to(device)
    expected = theirs(ids).logits
    assert patch(model).refused == {}
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    half = load_model(tmp_path, device=device, dtype=torch.float16).model
    name, linear = next(linears_of(theirs))
    ours = half.get_submodule(name)
    ours = ours if type(ours) is nn.Linear else ours.dense(torch.float16)
    assert torch.equal(ours.weight, linear.weight.half())


def test_dequantised(tmp_path, device):
    """As torch's linears, for what takes no NF4: the same model, and one that is saved as dense."""
    theirs = write(tmp_path, tiny_model("qwen2"), lambda linear: four_bits(linear, "nf4", True, 32))
    loaded = load_model(tmp_path, device=device, dtype=torch.float32, dequantize=True)
    kinds = {type(part) for name, part in loaded.model.named_modules() if name.endswith("_proj")}
    assert kinds == {nn.Linear}
    assert not any(part.training for part in loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    for name, linear in linears_of(theirs):
        assert torch.equal(loaded.model.get_submodule(name).weight.cpu(), linear.weight)
    loaded.model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    again = load_model(tmp_path / "dense", device=device).model
    assert torch.equal(again(IDS.to(device)).logits, loaded.model(IDS.to(device)).logits)


def test_eight_bits(tmp_path, device):
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    theirs = write(tmp_path, tiny_model("llama"), eight_bits, config).to(device)
    model = load_model(tmp_path, device=device, dtype=torch.float32, exact=True).model
    for name, linear in linears_of(theirs):
        ours = model.get_submodule(name)
        assert type(ours) is GroupLinear
        assert torch.equal(ours.dense(torch.float32).weight, linear.weight)
    ids = IDS.to(device)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    file = tmp_path / "model.safetensors"
    other = {"model.layers.0.mlp.up_proj.weight_format": torch.tensor(2, dtype=torch.uint8)}
    save_file(load_file(file) | other, file)
    with pytest.raises(ModelFileError, match="weight_format must be 0"):
        load_model(tmp_path)
    tensors = load_file(file) | {name: torch.tensor(0, dtype=torch.uint8) for name in other}
    save_file(tensors | {"model.layers.0.mlp.up_proj.SCB": torch.ones(1)}, file)
    with pytest.raises(ModelFileError, match="SCB must have 160 values, one for each row, got 1"):
        load_model(tmp_path)


NF4 = [
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
]  # as the paper on QLoRA prints them


@pytest.mark.parametrize("shape", [(16,), (1, 16), (16, 1)])
def test_bytes_written_out(shape):
    """Two blocks of four, the first code of a byte in its high bits; values worked out by hand."""
    text = b'{"quant_type": "nf4", "blocksize": 4, "dtype": "float16", "shape": [2, 4]}'
    found = {
        "weight": torch.tensor([[0x0F], [0x73], [0x8E], [0xF1]], dtype=torch.uint8),
        "weight.absmax": torch.tensor([2.0, 0.5]),
        "weight.quant_map": torch.tensor(NF4).view(shape),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }
    expected = [[-2.0, 2.0, 0.0, -0.7898350], [0.0397901, 0.3614784, 0.5, -0.3480964]]
    weight = read_four_bits(found).dense(torch.float32).weight
    torch.testing.assert_close(weight.data, torch.tensor(expected), rtol=0, atol=1e-6)


def test_rows_written_out():
    scales = row_scales({"SCB": torch.tensor([2.54, 127.0])}, 2)
    torch.testing.assert_close(scales, torch.tensor([[0.02], [1.0]]))


def test_refusals(tmp_path):
    write(tmp_path, tiny_model("llama"), lambda linear: four_bits(linear, "nf4", True))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    start = "model.layers.1.mlp.up_proj.weight"
    state = f"{start}.quant_state.bitsandbytes__nf4"

    def refusal(**changes):
        changed = tensors | {name: value for name, value in changes.items() if value is not None}
        for name, value in changes.items():
            if value is None:
                del changed[name]
        save_file(changed, file)
        with pytest.raises(ModelFileError) as caught:
            load_model(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "must have one quant_state of nf4 or fp4" in refusal(**{state: None})
    assert "must be JSON in bytes" in refusal(**{state: torch.ones(3, dtype=torch.uint8)})
    text = torch.tensor(list(b'{"shape": [4], "blocksize": 64}'), dtype=torch.uint8)
    assert "shape must be two sizes, got [4]" in refusal(**{state: text})
    text = torch.tensor(list(b'{"shape": [160, 288], "blocksize": 0}'), dtype=torch.uint8)
    assert "blocksize must be a size from 1, got 0" in refusal(**{state: text})
    told = json.loads(bytes(tensors[state].tolist()))

    def with_field(name, value):
        changed = json.dumps(told | {name: value}).encode()
        return refusal(**{state: torch.tensor(list(changed), dtype=torch.uint8)})

    negative = [-size for size in told["shape"]]
    assert "shape must be of sizes from 1, got [-" in with_field("shape", negative)
    assert "blocksize must be a size from 1, got True" in with_field("blocksize", True)
    assert "nested_blocksize must be a size from 1, got 0" in with_field("nested_blocksize", 0)
    sentence = "nested_offset must be a finite number, got"
    assert f"{sentence} nan" in with_field("nested_offset", float("nan"))
    assert f"{sentence} None" in with_field("nested_offset", None)
    signed = tensors[f"{start}.absmax"].view(torch.int8)
    assert "must be uint8 or floating, got torch.int8" in refusal(**{f"{start}.absmax": signed})
    assert "a table of 15" in refusal(**{f"{start}.quant_map": torch.ones(15)})
    assert "weight.quant_map is missing" in refusal(**{f"{start}.quant_map": None})
    short = tensors[start][:-1].clone()
    assert "bytes of codes of a table of 16" in refusal(**{start: short})
    short = tensors[f"{start}.absmax"][:-1].clone()
    assert "weight.absmax must have" in refusal(**{f"{start}.absmax": short})


def test_patch_names_a_model_that_transformers_loaded(monkeypatch):
    model = tiny_model("llama")
    strange = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.model.layers[0].self_attn.q_proj.__class__ = strange
    with pytest.warns(UserWarning, match="stay as they were"):
        report = patch(model)
    reason = report.refused["model.layers.0.self_attn"]
    assert "q_proj is bitsandbytes' Linear4bit, which patch does not serve" in reason
