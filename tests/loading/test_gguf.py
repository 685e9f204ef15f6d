"""Models from GGUF files against transformers' models of the dequantised weights."""

import copy
import math

import gguf
import pytest
import torch
from gguf_models import FAMILIES, write_model
from tolerance import assert_within_2x

from llamatelemetry.loading.find import load_gguf
from llamatelemetry.loading.gguf_file import ModelFileError
from llamatelemetry.ops import QuantFormat
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear, merge_quant_linears

IDS = torch.tensor([[5, 70, 6, 200, 31, 8, 8, 256]])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def logits_close(model, reference):
    device = model.device
    same_dtype = reference.to(device)(IDS.to(device)).logits
    ref64 = reference.double()(IDS.to(device)).logits
    assert_within_2x(model(IDS.to(device)).logits, same_dtype, ref64)


@pytest.mark.parametrize("format", list(QuantFormat), ids=lambda f: f.name)
def test_formats(path, format, device):
    reference = write_model(path, format=format)
    loaded = load_gguf(path, device=device, exact=True)
    model = loaded.model
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantLinear)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantised = sum(p.numel() for p in reference.parameters() if p.ndim == 2)
    assert loaded.weight_bytes < 1.1 * quantised * format.row_bytes(256) / 256 + 2**15
    logits_close(model, reference)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(path, family, tied, device):
    reference = write_model(path, family, tied=tied)
    logits_close(load_gguf(path, device=device, exact=True).model, reference)


@pytest.mark.parametrize("tied", [True, False])
def test_unquantised(path, tied, device):
    reference = write_model(path, format=None, tied=tied)
    model = load_gguf(path, device=device, dtype=torch.float32).model
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    logits_close(model, reference)


def test_half_activations(path, device):
    reference = write_model(path).to(device)
    model = load_gguf(path, device=device, dtype=torch.bfloat16, exact=True).model
    ref64 = copy.deepcopy(reference).double()(IDS.to(device)).logits
    out = model(IDS.to(device)).logits
    assert_within_2x(out, reference.bfloat16()(IDS.to(device)).logits, ref64)


def test_rope_factors_and_linear_scaling(path):
    factors = torch.linspace(1, 8, 16)
    reference = write_model(
        path, extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors.numpy())
    )
    reference.model.rotary_emb.inv_freq /= factors
    model = load_gguf(path, exact=True).model
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)

    def scale(writer):
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 4.0)

    reference = write_model(path, extra=scale)
    model = load_gguf(path, exact=True).model
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq / 4)


@pytest.mark.parametrize("original", [16, None])
def test_yarn(path, original):
    def scale(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_float32("llama.rope.scaling.yarn_ext_factor", 1.0)
        writer.add_float32("llama.rope.scaling.yarn_beta_fast", 24.0)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)

    write_model(path, extra=scale)
    model = load_gguf(path, exact=True).model
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "beta_fast": 24.0,
        "original_max_position_embeddings": original or 64,
    }
    config = copy.deepcopy(model.config)
    config.rope_parameters = yarn
    theirs = type(model.model.rotary_emb)(config)
    ours = model.model.rotary_emb
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_scaling == theirs.attention_scaling > 1
    # By hand, of the paper: what turns seldom is stretched, what turns often is not.
    plain = 1 / 5000.0 ** (torch.arange(0, 32, 2) / 32)
    assert ours.inv_freq[-1] == pytest.approx(plain[-1] / 4)
    assert ours.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_biases_that_some_files_have(path):
    width = {"attn_q": 256, "attn_k": 64, "attn_v": 64}
    biases = {f"blk.{i}.{name}.bias": torch.randn(n) for i in range(2) for name, n in width.items()}

    def extra(writer):
        for name, bias in biases.items():
            writer.add_tensor(name, bias.numpy())

    reference = write_model(path, extra=extra)
    model = load_gguf(path, exact=True).model
    assert torch.equal(model.model.layers[1].self_attn.o_proj.bias, torch.zeros(256))
    for i, layer in enumerate(reference.model.layers):
        for name, heads in (("q", 8), ("k", 2), ("v", 0)):
            bias = biases[f"blk.{i}.attn_{name}.bias"]
            if heads:  # pairs of neighbours to halves
                bias = bias.view(heads, -1, 2).transpose(1, 2).reshape(-1)
            getattr(layer.self_attn, f"{name}_proj").bias = torch.nn.Parameter(bias)
    logits_close(model, reference)


def test_what_comes_with_the_model(path):
    write_model(path, extra=lambda writer: writer.add_name("Small"))
    steps = []
    loaded = load_gguf(path, progress=lambda done, total: steps.append((done, total)))
    eos = loaded.tokenizer.eos_token_id
    assert (loaded.name, loaded.context_length, loaded.eos_ids) == ("Small", 64, (eos,))
    assert loaded.model.generation_config.eos_token_id == [eos]
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    ids = loaded.tokenizer("the cat", return_tensors="pt").input_ids
    out = loaded.model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= ids.shape[1] + 3


def test_merge_quant_linears(path, device):
    write_model(path, "qwen2")
    model = load_gguf(path, device=device, dtype=torch.float32).model
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(3, 256, device=device)
    apart = torch.cat([part(x) for part in parts], -1)
    merged = merge_quant_linears(parts)
    assert torch.equal(merged(x), apart)
    assert torch.equal(torch.cat([part(x) for part in parts], -1), apart)
    storages = {part.weight.untyped_storage().data_ptr() for part in (*parts, merged)}
    assert len(storages) == 1
    parts[1].exact = True
    assert merge_quant_linears(parts) is None


REFUSALS = {
    "missing tensor": (
        {"without": ["blk.1.ffn_up.weight"]},
        r"the tensor for model.layers.1.mlp.up_proj.weight is missing",
    ),
    "missing embedding": (
        {"without": ["token_embd.weight"]},
        r"tensor token_embd.weight is missing",
    ),
    "missing key": (
        {"without": ["llama.block_count"]},
        r"metadata key llama.block_count is missing",
    ),
    "unknown key": (
        {"extra": lambda w: w.add_uint32("llama.attention.sliding_window", 9)},
        r"llama.attention.sliding_window = 9 is not known here; .*from_pretrained\(.* gguf_file=",
    ),
    "experts": (
        {"family": "qwen2", "extra": lambda w: w.add_expert_count(8)},
        r"a mixture of experts is not supported for this architecture",
    ),
    "rope scaling": (
        {"extra": lambda w: w.add_string("llama.rope.scaling.type", "longrope")},
        r"llama.rope.scaling.type must be one of none, linear, yarn, got longrope",
    ),
    "partial rope": (
        {"extra": lambda w: w.kv_data[0]["llama.rope.dimension_count"].__setattr__("value", 16)},
        r"llama.rope.dimension_count must be the head's 32, got 16",
    ),
    "extra tensor": (
        {"extra": lambda w: w.add_tensor("v.weight", torch.zeros(3).numpy())},
        r"tensor v.weight is no part of a llama model",
    ),
    "extra bias": (
        {"extra": lambda w: w.add_tensor("blk.0.attn_norm.bias", torch.zeros(256).numpy())},
        r"tensor blk.0.attn_norm.bias is no part of a llama model",
    ),
    "shape": (
        {"extra": lambda w: w.kv_data[0]["llama.feed_forward_length"].__setattr__("value", 768)},
        r"must be \(256, 768\), got \(256, 512\)|must be \(768, 256\), got \(512, 256\)",
    ),
    "architecture": (
        {"extra": lambda w: w.kv_data[0]["general.architecture"].__setattr__("value", "mamba")},
        r"general.architecture must be one of llama, .*, got mamba; .* gguf_file='",
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusals(path, case):
    changes, message = REFUSALS[case]
    write_model(path, **changes)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
