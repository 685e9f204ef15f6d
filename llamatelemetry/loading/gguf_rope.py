"""rope_parameters of a transformers config, from a GGUF file's metadata and tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llamatelemetry.loading.gguf_file import GgufFile
from llamatelemetry.loading.gguf_rows import GgufRow

FACTORS = "rope_freqs.weight"
_LONG = {name: f"rope_factors_{name}.weight" for name in ("short", "long")}
TENSORS = {FACTORS, *_LONG.values()}  # no module has them: the angles are made of them


def rope_parameters(file: GgufFile, prefix: str, row: GgufRow, head_dim: int) -> dict[str, Any]:
    """The config's fields for the rotary embedding.

    Raises:
        ModelFileError: a width or a scaling that the architecture's class does not have.
    """
    width = file.positive(prefix + "rope.dimension_count", int, head_dim)
    if width != head_dim and not (row.partial_rope and width < head_dim):
        rule = f"at most the head's {head_dim}" if row.partial_rope else f"the head's {head_dim}"
        raise file.error(f"{prefix}rope.dimension_count must be {rule}, got {width}")
    theta = file.positive(prefix + "rope.freq_base", float, 10000.0)
    found = {"rope_theta": theta, **row.rope, **_scaling(file, prefix)}
    for key, name in row.rope_keys.items():
        if file.metadata.get(prefix + key):
            found[name] = file.positive(prefix + key, float)
    if "llama_4_scaling_beta" in found:  # queries are scaled by where they stand in it
        trained = file.positive(prefix + "context_length", int)
        found.setdefault("original_max_position_embeddings", trained)
    fields: dict[str, Any] = {"rope_parameters": found}
    if row.partial_rope:
        found["partial_rotary_factor"] = fields["partial_rotary_factor"] = width / head_dim
    if all(name in file.tensors for name in _LONG.values()):
        found |= _long_rope(file, width // 2)
        fields["original_max_position_embeddings"] = found["original_max_position_embeddings"] = (
            file.positive(prefix + "rope.scaling.original_context_length", int)
        )
    if row.sliding_rope is not None:
        base = file.positive(prefix + "rope.freq_base_swa", float, row.sliding_rope or theta)
        sliding = {"rope_type": "default", "rope_theta": base}
        fields["rope_parameters"] = {"full_attention": found, "sliding_attention": sliding}
    return fields


def rope_factors(file: GgufFile, name: str, count: int) -> Tensor:
    """What the frequencies of the rotary embedding are divided by, [count] float32."""
    tensor = file.tensors[name]
    if tensor.format is not None or tensor.shape != (count,):
        kind = tensor.format.name if tensor.format else "dense"
        raise file.error(
            f"tensor {name} must be ({count},) and not quantised, got {tensor.shape}, {kind}"
        )
    factors = file.dense(tensor).float()
    if not (factors.isfinite() & (factors > 0)).all():
        raise file.error(f"tensor {name} must hold positive and finite factors")
    return factors


def _long_rope(file: GgufFile, count: int) -> dict[str, Any]:
    lists = {f"{kind}_factor": rope_factors(file, name, count) for kind, name in _LONG.items()}
    return {"rope_type": "longrope", **{name: value.tolist() for name, value in lists.items()}}


def _scaling(file: GgufFile, prefix: str) -> dict[str, Any]:
    key = prefix + "rope.scaling.factor"
    if key not in file.metadata:
        key = prefix + "rope.scale_linear"  # its older name
    # As llama.cpp reads it: a factor whose type is not said is linear.
    implied = "linear" if key in file.metadata else "none"
    scaling = file.value(prefix + "rope.scaling.type", str, implied)
    if scaling == "none":
        return {"rope_type": "default"}
    if scaling == "linear":
        return {"rope_type": "linear", "factor": file.positive(key, float)}
    if scaling == "yarn":
        trained = file.positive(prefix + "context_length", int)
        original = prefix + "rope.scaling.original_context_length"
        found = {
            "rope_type": "yarn",
            "factor": file.positive(key, float),
            "original_max_position_embeddings": file.positive(original, int, trained),
        }
        for name in ("beta_fast", "beta_slow"):
            if (beta := f"{prefix}rope.scaling.yarn_{name}") in file.metadata:
                found[name] = file.positive(beta, float)
        return found
    raise file.unserved(
        f"{prefix}rope.scaling.type must be one of none, linear, yarn, got {scaling}"
    )
