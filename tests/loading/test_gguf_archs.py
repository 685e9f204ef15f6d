"""Every GGUF architecture against transformers' model of the same weights: logits and text."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from gguf_arch_rows import ARCHS
from gguf_archs import write_arch
from tolerance import assert_within_2x

from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.loading.find import load_gguf
from llamatelemetry.loading.gguf_file import ModelFileError
from llamatelemetry.loading.gguf_rows import ARCHITECTURES
from llamatelemetry.quantization.experts import QuantExperts
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear, expand

IDS = torch.tensor([[5, 70, 6, 200, 31, 8, 8, 256, 90, 17]])
NEW_TOKENS = 24  # past the windows, and past what yarn and longrope were trained on


PROMPT = "the cat sat on the mat, and"


@pytest.fixture(autouse=True)
def _as_a_user_s():
    """Models whose attention is patched must not be made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def text_of(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("packed", [False, True], ids=["float32", "Q8_0"])
@pytest.mark.parametrize("key", list(ARCHS))
def test_logits_and_text(tmp_path, key, packed):
    reference = write_arch(tmp_path / "model.gguf", key, packed)
    loaded = load_gguf(tmp_path / "model.gguf", exact=True)
    model = loaded.model
    assert type(model) is type(reference)
    kinds = {type(module) for module in model.modules()}
    assert (QuantLinear in kinds, QuantEmbedding in kinds) == (packed, packed)
    experts = any(".experts." in name for name, _ in reference.named_parameters())
    assert (QuantExperts in kinds) == (packed and experts)
    theirs = reference(IDS).logits
    text = text_of(reference, loaded.tokenizer)
    reference.config._experts_implementation = "eager"  # the others have no float64
    assert_within_2x(model(IDS).logits, theirs, reference.double()(IDS).logits)
    engine = InferenceEngine(loaded)
    assert engine.infer(PROMPT, NEW_TOKENS, 0.0).text == text


@pytest.mark.parametrize("key", ["gemma", "qwen3moe", "gpt-oss"])
def test_expanded_weights(tmp_path, key):
    reference = write_arch(tmp_path / "model.gguf", key, packed=True)
    model = load_gguf(tmp_path / "model.gguf").model
    expand(model, torch.float32)
    reference.config._experts_implementation = model.config._experts_implementation = "eager"
    theirs = reference(IDS).logits
    assert_within_2x(model(IDS).logits, theirs, reference.double()(IDS).logits)


def test_every_architecture_has_a_file():
    elsewhere = {"llama", "qwen2", "qwen3", "granite"}  # test_gguf.py
    assert {arch.name or key for key, arch in ARCHS.items()} | elsewhere == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("key", "change", "sentence"),
    [
        (
            "exaone4",
            lambda w: w.add_sliding_window_pattern([True]),
            "sliding_window_pattern must have a value for each of the 4 blocks, got 1",
        ),
        (
            "glm4",
            lambda w: w.kv_data[0]["glm4.rope.dimension_count"].__setattr__("value", 40),
            "glm4.rope.dimension_count must be at most the head's 32, got 40",
        ),
        (
            "gpt-oss",
            lambda w: w.tensors[0].pop("blk.1.ffn_up_exps.bias"),
            "the tensor for model.layers.1.mlp.experts.up.bias is missing",
        ),
        (
            "qwen3moe",
            lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
            "expert_gating_func = 2 is not known here; the original model's directory may load",
        ),
        (
            "mixtral",
            lambda w: w.add_tensor("blk.0.ffn_gate.0.weight", np.zeros((2, 2), np.float32)),
            "tensor blk.0.ffn_gate.0.weight comes beside blk.0.ffn_gate_exps.weight",
        ),
        (
            "mixtral, old",
            lambda w: w.tensors[0].pop("blk.1.ffn_up.3.weight"),
            "the tensor for model.layers.1.mlp.experts.3.up.weight is missing",
        ),
        (
            "mixtral, old",
            lambda w: (
                w.tensors[0].pop("blk.0.ffn_up.1.weight"),
                w.add_tensor(
                    "blk.0.ffn_up.1.weight",
                    quantize(np.zeros((96, 128), np.float32), gguf.GGMLQuantizationType.Q8_0),
                    raw_dtype=gguf.GGMLQuantizationType.Q8_0,
                ),
            ),
            "blk.0.ffn_up.1.weight must have one type",
        ),
    ],
)
def test_refusals(tmp_path, key, change, sentence):
    def extra(writer):
        writer.kv_data[0].pop(f"{key}.attention.sliding_window_pattern", None)
        change(writer)

    write_arch(tmp_path / "model.gguf", key, packed=False, extra=extra)
    with pytest.raises(ModelFileError, match=re.escape(sentence)):
        load_gguf(tmp_path / "model.gguf")
