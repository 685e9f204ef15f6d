"""Tiny models whose activations leave float16's range, each in its own way."""

from __future__ import annotations

import transformers
from families import VOCAB, tiny_model


def scale_(model, **factors):
    """Multiplies the weights of every layer's modules of these names."""
    for name, module in model.named_modules():
        factor = factors.get(name.rpartition(".")[2])
        if factor is not None:
            module.weight.mul_(factor)
    return model


def gemma3():
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    for layer in model.model.layers:  # its trained norms reach such weights
        layer.post_feedforward_layernorm.weight.fill_(6e4)
    return model


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for block in model.transformer.h:
        block.mlp.c_fc.weight.mul_(30)
        block.mlp.c_proj.weight.mul_(1e6)
    return model


# What overflows, and the products that must then have their input scaled.
OVERFLOWS = {
    "residual": (lambda: scale_(tiny_model("llama"), down_proj=1e5), "down_proj"),
    "gate_times_up": (
        lambda: scale_(tiny_model("qwen3"), gate_proj=1e3, up_proj=1e3, down_proj=1e-3),
        "down_proj",
    ),
    "values": (lambda: scale_(tiny_model("qwen3"), v_proj=1e5, o_proj=1e-2), "v_proj"),
    "norm": (gemma3, ""),
    "conv1d": (gpt2, "c_proj"),
}

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_HEADS = {"num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Class -> the options of its configuration.
BUILDS = {
    "MixtralForCausalLM": _COMMON | _HEADS | _EXPERTS,
    "GptOssForCausalLM": _COMMON | _HEADS | _EXPERTS | {"head_dim": 16},
    "Phi3ForCausalLM": _COMMON | _HEADS,
    "Olmo2ForCausalLM": _COMMON | _HEADS,
    "GPTNeoXForCausalLM": _COMMON,
    "BertModel": _COMMON,
    "T5ForConditionalGeneration": {
        "vocab_size": VOCAB,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}


def wide_embeddings(name):
    """A model of this class whose embeddings come near 65504."""
    stem = name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    config = getattr(transformers, f"{stem.removesuffix('Model')}Config")(**BUILDS[name])
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
    model.get_input_embeddings().weight.mul_(6e4)
    return model
