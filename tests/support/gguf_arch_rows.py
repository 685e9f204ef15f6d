"""How a class of transformers becomes a GGUF file: a row for each architecture, and more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch

_WINDOW = 6
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

Meta = Callable[[gguf.GGUFWriter, Any], None]


@dataclass(frozen=True)
class Arch:
    """How a class of transformers becomes a file."""

    cls: str
    options: dict[str, Any] = field(default_factory=dict)
    meta: Meta = lambda writer, config: None
    name: str = ""  # the architecture, where the key is not its name
    permuted: bool = False  # rows of q and k
    one_added: bool = False  # to weights of norms
    one_by_one: bool = False  # experts: a tensor for each
    tied: bool = False


def _partial(share: float) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": share}
    return {"rope_parameters": rope, "partial_rotary_factor": share}


def _sliding(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _pattern(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _softcaps(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _linear_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


def _yarn(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])


def _ministral(writer: gguf.GGUFWriter, config: Any) -> None:
    _yarn(writer, config)
    writer.add_rope_scaling_yarn_log_mul(config.rope_parameters["mscale_all_dim"])
    writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])


def _cohere(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _cohere2(writer: gguf.GGUFWriter, config: Any) -> None:
    _cohere(writer, config)
    writer.add_sliding_window(config.sliding_window)


def _stablelm(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def _long_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(0)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_rope_scaling_attn_factors(1.25)
    for name in ("long", "short"):
        factors = torch.tensor(config.rope_parameters[f"{name}_factor"])
        writer.add_tensor(f"rope_factors_{name}.weight", factors.numpy())


def _experts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)


def _own_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    _experts(writer, config)
    writer.add_expert_feed_forward_length(64)


def _shared_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    _own_experts(writer, config)
    writer.add_expert_shared_feed_forward_length(160)


def _gpt_oss(writer: gguf.GGUFWriter, config: Any) -> None:
    _experts(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_sliding_window(config.sliding_window)
    _yarn(writer, config)


def _granite(writer: gguf.GGUFWriter, config: Any) -> None:
    _experts(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


_SLIDES = {"sliding_window": _WINDOW}
_UNLIKE = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 8 for i in range(12)],
    "long_factor": [2.0 + i for i in range(12)],
    "attention_factor": 1.25,
}


def _longrope(original: int) -> dict[str, Any]:
    rope = {**_LONG, "original_max_position_embeddings": original}
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


_LLAMA4 = {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.25}
_MULTIPLIERS = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}

ARCHS: dict[str, Arch] = {
    "gemma": Arch("Gemma", one_added=True, tied=True),
    "gemma2": Arch(
        "Gemma2",
        {
            **_SLIDES,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 8.0,
            "final_logit_softcapping": 5.0,
        },
        _softcaps,
        one_added=True,
        tied=True,
    ),
    "gemma3": Arch(
        "Gemma3Text",
        {
            **_SLIDES,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 6,
            "rope_parameters": _TWO_ROPES,
        },
        _linear_rope,
        one_added=True,
        tied=True,
    ),
    "phi3": Arch("Phi3", _partial(0.75), lambda w, c: w.add_sliding_window(0)),
    "phi3 sliding": Arch("Phi3", {**_partial(1.0), **_SLIDES}, _sliding, "phi3"),
    "phi3 longrope": Arch("Phi3", _longrope(4), _long_rope, "phi3"),
    "phi3 longrope, short": Arch("Phi3", _longrope(60), _long_rope, "phi3"),
    "smollm3": Arch("SmolLM3", permuted=True, tied=True),
    "olmo2": Arch("Olmo2"),
    "olmo3": Arch("Olmo3", {**_SLIDES, "rope_parameters": None}, _pattern, "olmo2"),
    "starcoder2": Arch("Starcoder2", {"norm_epsilon": 1e-5, **_SLIDES}, _sliding, tied=True),
    "stablelm": Arch("StableLm", {**_partial(0.25), "use_qkv_bias": True}, _stablelm),
    "stablelm parallel": Arch(
        "StableLm", {**_partial(0.25), "use_parallel_residual": True}, _stablelm, "stablelm"
    ),
    "stablelm norms": Arch(
        "StableLm", {**_partial(0.25), "qk_layernorm": True}, _stablelm, "stablelm"
    ),
    "glm4": Arch("Glm4", {**_partial(0.5), "attention_bias": True}),
    "command-r": Arch("Cohere", {"logit_scale": 0.5}, _cohere, tied=True),
    "command-r norms": Arch(
        "Cohere", {"logit_scale": 0.5, "use_qk_norm": True}, _cohere, "command-r", tied=True
    ),
    "cohere2": Arch("Cohere2", {**_SLIDES, "logit_scale": 0.5}, _cohere2, tied=True),
    "exaone4": Arch("Exaone4", {**_SLIDES, "layer_types": _UNLIKE}, _pattern),
    "exaone4 full": Arch(
        "Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, name="exaone4"
    ),
    "mixtral": Arch("Mixtral", _EXPERTS, _experts, "llama", permuted=True),
    "mixtral, old": Arch("Mixtral", _EXPERTS, _experts, "llama", permuted=True, one_by_one=True),
    "qwen2moe": Arch(
        "Qwen2Moe",
        {**_EXPERTS, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 160},
        _shared_experts,
    ),
    "qwen3moe": Arch(
        "Qwen3Moe",
        {**_EXPERTS, "moe_intermediate_size": 64, "norm_topk_prob": True},
        _own_experts,
    ),
    "olmoe": Arch("Olmoe", _EXPERTS, _experts),
    "granitemoe": Arch("GraniteMoe", {**_EXPERTS, **_MULTIPLIERS}, _granite, permuted=True),
    "gpt-oss": Arch(
        "GptOss",
        {**_EXPERTS, **_SLIDES, "rope_parameters": {**_YARN, "truncate": False}},
        _gpt_oss,
    ),
    "mistral3": Arch("Ministral3", {"rope_parameters": _LLAMA4}, _ministral, permuted=True),
    "arcee": Arch("Arcee", permuted=True),
    "seed_oss": Arch("SeedOss", {"attention_bias": True}),
    "ernie4_5": Arch("Ernie4_5", tied=True),
}
