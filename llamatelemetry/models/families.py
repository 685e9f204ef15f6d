"""The one table of model families: transformers' class, the GGUF architecture, the layer's spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", LayerSpec(), Gguf("llama", interleaved=True)),
    "MistralForCausalLM": Family("mistral", LayerSpec(window="sliding_window")),
    "Qwen2ForCausalLM": Family("qwen2", LayerSpec(window="sliding_window"), Gguf("qwen2")),
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
