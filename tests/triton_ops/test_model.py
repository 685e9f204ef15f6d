"""Whole models with the ops in Triton: the greedy text of the native path, in float32."""

from __future__ import annotations

import argparse
import copy
import pickle

import pytest
import torch
from hf_models import TINY_SIZES
from perplexity import perplexities
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton")

from llamatelemetry.cli import tune
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.packed import patch_or_reason
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.models import opset
from llamatelemetry.models.opset import opset_of
from llamatelemetry.models.patching import ops_of, patch, unpatch
from llamatelemetry.models.pieces.linear import Joined
from llamatelemetry.profiling.kernels import kernels_of, why_not_only

SIZES = {
    "vocab_size": 97,
    **TINY_SIZES,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "granite-code": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True, "attention_bias": True}),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
        },
    ),
}
# Lengths 3, 1 and 126, which pass 127 with new tokens; of the interpreter 18, as it is slow.
LONG = {"cuda": 63, "cpu": 9}


class Other(torch.nn.Linear):
    """A layer that may compute something else."""


def tiny(name, device, **sizes):
    config, kind, more = MODELS[name]
    torch.manual_seed(0)
    model = kind(config(**SIZES | sizes, **more)).eval().requires_grad_(False)
    for parameter in model.parameters():  # no zero biases, and no ties
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.to(device)


def prompts_on(device):
    return [[1, 2, 3], [5, 9] * LONG[device.type], [7]]


def text(model, params, tokens=4):
    prompts = prompts_on(model.device)
    return list(TokenGenerator(model).generate(prompts, [params] * len(prompts), tokens))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_native_path_s(device, name):
    with torch.inference_mode(False):
        model = tiny(name, device)
        patch(model, strict=True)
        native = text(model, GREEDY)
        unpatch(model)
        report = patch(model, strict=True, backend="triton")
        assert ops_of(model) is opset_of("triton")
        assert report.not_packed is None
        assert set(report.replaced) == {"RmsNorm", "Attention", "GatedMlp", "DecoderLayer"}
        assert text(model, GREEDY) == native


def test_sampled_text_is_the_native_path_s(device):
    params = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=3, repetition_penalty=1.1)
    with torch.inference_mode(False):
        model = tiny("llama", device)
        patch(model)
        native = text(model, params, 2)
        unpatch(model)
        patch(model, backend="triton")
        assert text(model, params, 2) == native


def test_perplexity_is_the_native_path_s(device):
    """Within 0.1 %, of texts of any length."""
    lengths = [1, 3, 127, 4097] if device.type == "cuda" else [1, 3, 17]
    with torch.inference_mode(False):
        model = tiny("llama", device, max_position_embeddings=8192)
        texts = [torch.randint(97, (n + 1,)).tolist() for n in lengths]
        found = []
        for backend in ("native", "triton"):
            patch(model, strict=True, backend=backend)
            found.append(perplexities(model, texts))
            unpatch(model)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_no_kernel_but_triton_s_and_torch_s_own(device):
    """Whole generations, prompts and steps, greedy and sampled: none of cuBLAS, cuDNN, CUTLASS or
    of ours in CUDA; of the native path, some."""
    if device.type != "cuda":
        pytest.skip("the interpreter has no kernels to name; needs a device")
    sampled = SamplingParams(temperature=0.8, top_k=20, top_p=0.9)
    with torch.inference_mode(False):
        model = tiny("granite-code", device).bfloat16()
        patch(model, strict=True, backend="triton")
        generator = TokenGenerator(model)

        def generate():
            for params in (GREEDY, sampled):
                list(generator.generate(prompts_on(device), [params] * 3, 3))

        generate()  # makes the rotary embedding's table, by transformers' own code
        assert why_not_only("triton", kernels_of(generate)) is None
        unpatch(model)
        patch(model, strict=True)
        generator = TokenGenerator(model)
        assert "(llamatelemetry)" in why_not_only("triton", kernels_of(generate))


def test_triton_serves_where_the_build_has_no_kernels(device, monkeypatch):
    """Unasked; a model that it does not serve generates by transformers' own forward."""
    monkeypatch.setattr(opset, "backend_for", lambda device: ("triton", "the build has none"))
    with torch.inference_mode(False):
        model = tiny("llama", device, num_hidden_layers=1)
        with pytest.warns(UserWarning, match="Triton's kernels serve this model: the build has"):
            assert patch_or_reason(model)[1] is None
        assert ops_of(model) is opset_of("triton")
        unpatch(model)
        model.lm_head = Other(64, 97, device=device)
        with pytest.warns(UserWarning, match="the build has none"):
            report, reason = patch_or_reason(model)
        assert ops_of(model) is opset_of("native")
        assert report.not_packed == reason
        assert "Other" in reason
        with pytest.raises(ValueError, match="Other"):
            patch_or_reason(model, "triton")


def test_copies_and_pickles_keep_the_ops():
    assert copy.deepcopy(opset_of("triton")) is opset_of("triton")
    assert pickle.loads(pickle.dumps(opset_of("triton"))) is opset_of("triton")


@pytest.mark.without_triton
def test_refuses_what_it_does_not_serve():
    with pytest.raises(ValueError, match="one of native, triton, got 'cuda'"):
        opset_of("cuda")

    with pytest.raises(ValueError, match=r"torch's Linear, W8A8Linear, .* got Other"):
        Joined(Other(2, 2), (), opset_of("triton"))


@pytest.mark.without_triton
@pytest.mark.parametrize("layer", ["4096", "0x8", "axb"])
def test_tune_refuses_layers_that_are_none(layer, capsys):
    args = argparse.Namespace(
        layer=[layer], gated=None, prefill=None, e4m3=False, rows=[16], out="never.json"
    )
    assert tune.run(args) == 2
    assert f"a layer must be outputs x inputs, as 4096x14336, got {layer!r}" in (
        capsys.readouterr().err
    )


@pytest.mark.without_triton
def test_the_cpu_needs_the_interpreter(monkeypatch):
    from llamatelemetry.triton_ops import launch

    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    with torch.inference_mode(False), pytest.raises(ValueError, match="TRITON_INTERPRET=1 was set"):
        patch(tiny("llama", "cpu"), backend="triton")
