"""Directories whose routed experts are quantised one by one, as Mixtral's and Qwen's are."""

from __future__ import annotations

import pytest
import torch
from directories import change, tiny_tokenizer
from families import tiny_model
from quantised_directories import KINDS, _config, _quantise, linears_of
from safetensors.torch import load_file, save_file
from torch import nn

from llamatelemetry.loading.find import ModelFileError, load_model
from llamatelemetry.models.patching import patch
from llamatelemetry.quantization.experts import LinearExperts
from llamatelemetry.quantization.modules import expand

IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen": ("gate_proj", "up_proj", "down_proj")}


def write(path, model, kind, style):
    """Experts one by one under a style's names; the model gets the weights of the codes."""
    model.config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tensors = dict(model.state_dict())
    for name, linear in linears_of(model):
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": value for part, value in _quantise(linear, kind).items()}
    for name, _experts in model.named_modules():
        if not name.endswith(".experts"):
            continue
        gate_up, down = (tensors.pop(f"{name}.{part}_proj") for part in ("gate_up", "down"))
        for i in range(len(down)):
            weights = [*gate_up[i].chunk(2), down[i]]
            for part, weight in zip(NAMES[style], weights, strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                for key, value in _quantise(linear, kind).items():
                    tensors[f"{name}.{i}.{part}.{key}"] = value
                weight.copy_(linear.weight)
    if style == "mixtral":
        tensors = {n.replace(".mlp.", ".block_sparse_moe."): t for n, t in tensors.items()}
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    change(path / "config.json", quantization_config=_config(kind))
    return model


@pytest.mark.parametrize("style", NAMES)
@pytest.mark.parametrize("kind", ["gptq-act-order", "awq", "float8-column"])
@torch.no_grad()
def test_experts(tmp_path, device, kind, style):
    theirs = write(tmp_path, tiny_model("mixtral"), KINDS[kind], style).to(device)
    model = load_model(tmp_path, device=device, dtype=torch.float32, exact=True).model
    assert type(model.model.layers[0].mlp.experts) is LinearExperts
    ids = IDS.to(device)
    expected = theirs(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert patch(model).refused == {}
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    expand(model, torch.float32)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_dense_experts(tmp_path, whole):
    """Of a layer, or one beside quantised ones: as a quantiser leaves out what it is told to."""
    theirs = write(tmp_path, tiny_model("mixtral"), KINDS["float8-column"], "mixtral")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    start = "model.layers.1.block_sparse_moe.experts."
    of_linears = {name.rpartition(".")[0] for name in tensors if name.startswith(start)}
    for name in sorted(of_linears)[: None if whole else 1]:
        codes, scales = tensors[f"{name}.weight"], tensors.pop(f"{name}.weight_scale")
        tensors[f"{name}.weight"] = codes.float() * scales
    save_file(tensors, file)
    model = load_model(tmp_path, dtype=torch.float32, exact=True).model
    kinds = [type(layer.mlp.experts) is LinearExperts for layer in model.model.layers]
    assert kinds == [True, not whole]
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_refusals(tmp_path):
    write(tmp_path, tiny_model("mixtral"), KINDS["gptq"], "mixtral")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    start = "model.layers.1.block_sparse_moe.experts.3.w2"

    def refusal(changed):
        save_file(changed, file)
        with pytest.raises(ModelFileError) as caught:
            load_model(tmp_path)
        return str(caught.value)

    rest = {name: t for name, t in tensors.items() if not name.startswith(start)}
    missing = "the weights hold no model.layers.1.mlp.experts.down_proj"
    assert missing in refusal(rest)
    dense = rest | {f"{start}.weight": torch.zeros(160, 288)}
    assert "must be (288, 160) as config.json says, got (160, 288)" in refusal(dense)
    bytes_alone = rest | {f"{start}.weight": torch.zeros(288, 160, dtype=torch.int8)}
    assert "weight alone must be a matrix of floats, got torch.int8" in refusal(bytes_alone)
    swapped = {n.replace("experts.3.w2", "experts.3.w1"): t for n, t in rest.items()}
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        swapped[f"{start.replace('w2', 'w1')}.{part}"] = tensors[f"{start}.{part}"]
    assert "must be (160, 288) as config.json says, got (288, 160)" in refusal(swapped)
