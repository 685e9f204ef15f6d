"""The one table of model families: transformers' class, the GGUF architecture, the layer's spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from llamatelemetry.models.spec import LayerSpec


@dataclass(frozen=True)
class Gguf:
    """What a family is in GGUF files."""

    architecture: str
    # Rows of q and k come in the order of interleaved rotary embedding; transformers' is neox.
    interleaved: bool = False
    # metadata keys, less the architecture, that only this family has -> config fields
    keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    model_type: str  # transformers' name of its config
    spec: LayerSpec
    gguf: Gguf | None = None


_WINDOW = LayerSpec(window="sliding_window")
# GLM turns pairs of neighbours, by angles that its rotary module lays out in halves.
_GLM = LayerSpec(rope="interleaved", gate_up=("gate_up_proj",))

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", LayerSpec(), Gguf("llama", interleaved=True)),
    "MistralForCausalLM": Family("mistral", _WINDOW),
    "Qwen2ForCausalLM": Family("qwen2", _WINDOW, Gguf("qwen2")),
    "Qwen3ForCausalLM": Family(
        "qwen3", LayerSpec(qk_norm="head", window="sliding_window"), Gguf("qwen3")
    ),
    "GraniteForCausalLM": Family(
        "granite",
        LayerSpec(
            residual_multiplier="residual_multiplier",
            embedding_multiplier="embedding_multiplier",
            logits_scaling="logits_scaling",
        ),
        Gguf(
            "granite",
            interleaved=True,
            keys={
                "attention.scale": "attention_multiplier",
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
            },
        ),
    ),
    "ApertusForCausalLM": Family(
        "apertus",
        LayerSpec(
            first_norm="attention_layernorm",
            middle_norm="feedforward_layernorm",
            qk_norm="head",
            mlp_kind="own",
        ),
    ),
    "ArceeForCausalLM": Family("arcee", LayerSpec(mlp_kind="own")),
    "CwmForCausalLM": Family("cwm", _WINDOW),
    "GlmForCausalLM": Family("glm", _GLM),
    "Glm4ForCausalLM": Family(
        "glm4",
        replace(_GLM, attention_norm="post_self_attn_layernorm", mlp_norm="post_mlp_layernorm"),
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        "hunyuan_v1_dense",
        LayerSpec(
            qk_norm="head",
            qk_norm_names=("query_layernorm", "key_layernorm"),
            qk_norm_after_rope=True,
        ),
    ),
    "HeliumForCausalLM": Family("helium", LayerSpec(rope="interleaved")),
    "MinistralForCausalLM": Family("ministral", _WINDOW),
    "Phi3ForCausalLM": Family(
        "phi3", LayerSpec(qkv=("qkv_proj",), gate_up=("gate_up_proj",), window="sliding_window")
    ),
    "SeedOssForCausalLM": Family("seed_oss", LayerSpec()),
    "SmolLM3ForCausalLM": Family(
        "smollm3", LayerSpec(use_rope="use_rope", window="sliding_window")
    ),
}


def family_of(model: Any) -> Family:
    """The row of a transformers model.

    Raises:
        ValueError: no row is of the model's class.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"patch: model must be one of {', '.join(FAMILIES)}, got {name}; a further family is "
            "a further row of models/families.py"
        )
    return FAMILIES[name]


def architectures() -> dict[str, Family]:
    """GGUF architecture -> row."""
    return {row.gguf.architecture: row for row in FAMILIES.values() if row.gguf is not None}
