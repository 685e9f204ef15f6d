"""What models of some families list by name, and experts that are not read."""

from __future__ import annotations

import pytest
import torch
from directories import change, tiny_tokenizer
from quantised_directories import KINDS, Kind, _config, _quantise, linears_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV3Config, Glm4MoeConfig, Llama4TextConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from llamatelemetry.loading.find import ModelFileError, load_model
from llamatelemetry.loading.model_lists import is_of_ignored_layer, loaded_dtype

COMMON = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_experts_per_tok": 2, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
DEEPSEEK = DeepseekV3Config(
    **COMMON, num_key_value_heads=4, moe_intermediate_size=64, n_routed_experts=4,
    n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=32,
    kv_lora_rank=32, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32,
)  # fmt: skip
LLAMA4 = Llama4TextConfig(
    **COMMON, num_key_value_heads=2, intermediate_size_mlp=128, head_dim=32, num_local_experts=4
)
CORRECTIONS = torch.tensor([5.001, 5.002, 5.003, 5.004])  # all alike in bfloat16


def write(path, config, kind: Kind):
    """A directory with every linear and expert quantised; the model gets the codes' weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(CORRECTIONS)
    tensors = dict(model.state_dict())
    for name, linear in linears_of(model):
        if not name.endswith("router"):
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": value for part, value in _quantise(linear, kind).items()}
    for name, experts in model.named_modules():
        if not name.endswith(".experts"):
            continue
        across = not hasattr(experts, "is_transposed")  # Llama 4's are [experts, k, n]
        both, down = (tensors.pop(f"{name}.{part}_proj") for part in ("gate_up", "down"))
        both, down = (w.mT if across else w for w in (both, down))
        for i in range(len(down)):
            weights = [*both[i].chunk(2), down[i]]
            for part, weight in zip(("gate", "up", "down"), weights, strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                for key, value in _quantise(linear, kind).items():
                    tensors[f"{name}.{i}.{part}_proj.{key}"] = value
                weight.copy_(linear.weight)
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    change(path / "config.json", quantization_config=_config(kind))
    return model


@torch.no_grad()
def test_deepseek(tmp_path, device):
    """Corrections of the router stay float32; the layer past the last, quantised, is left out."""
    theirs = write(tmp_path, DEEPSEEK, KINDS["float8-column"]).to(device)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    past = {n.replace("layers.1.", "layers.61."): t.clone() for n, t in tensors.items()}
    save_file(tensors | past, file)
    ids = torch.tensor([[5, 17, 3, 80, 41, 9]], device=device)
    model = load_model(tmp_path, device=device, dtype=torch.float32, exact=True).model
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    model = load_model(tmp_path, device=device, dtype=torch.bfloat16).model
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias.cpu(), CORRECTIONS)
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_layers_that_a_model_has_are_not_ignored():
    """Glm4Moe lists layers 46 and 92, of which its larger model has the first."""
    sizes = COMMON | {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 47}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            Glm4MoeConfig(**sizes, num_key_value_heads=4, head_dim=2, first_k_dense_replace=47)
        )
    assert not is_of_ignored_layer(model, "model.layers.46.mlp.experts.0.up_proj.weight")
    assert is_of_ignored_layer(model, "model.layers.92.mlp.experts.0.up_proj.weight")
    assert not is_of_ignored_layer(model, "model.layers.93.mlp.up_proj.weight")


@pytest.mark.parametrize("listed", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_what_a_model_lists_as_float32(listed):
    model = nn.Module()
    setattr(model, listed, ["wo*weight"])
    half, wide = torch.float16, torch.float32
    brain = wide if listed.endswith("strict") else torch.bfloat16  # as transformers has it
    assert loaded_dtype(model, "a.wo.0.weight", wide, half) == wide
    assert loaded_dtype(model, "a.wo.0.weight", wide, torch.bfloat16) == brain
    assert loaded_dtype(model, "a.wi.weight", wide, half) == half
    assert loaded_dtype(model, "a.wo.weight", torch.int32, half) == torch.int32


@torch.no_grad()
def test_experts_laid_out_otherwise(tmp_path):
    write(tmp_path, LLAMA4, KINDS["float8-column"])
    with pytest.raises(ModelFileError, match="each routed expert must have gate, up and down"):
        load_model(tmp_path)
