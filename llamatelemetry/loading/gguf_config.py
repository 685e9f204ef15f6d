"""The transformers config that a GGUF file's metadata describes, every value of it checked."""

from __future__ import annotations

import re
from typing import Any

from llamatelemetry.loading.errors import in_one_sentence
from llamatelemetry.loading.gguf_file import GgufFile
from llamatelemetry.loading.tokenizer import eos_ids, special_ids
from llamatelemetry.models.families import Gguf, architectures

# metadata keys, less the architecture -> config fields
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
# read here, or implied by the tensors
_OTHER_KEYS = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
    "tensor_data_layout",
}
# keys that change nothing at these values, as if they were not there
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),  # -1 is llama.cpp's word for its default, 1 in yarn
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


def family_of_file(file: GgufFile) -> tuple[str, Gguf]:
    """transformers' model_type for the file's architecture, and what is particular in files.

    Raises:
        ModelFileError: an architecture that no row is of.
    """
    architecture, known = file.value("general.architecture", str), architectures()
    if architecture not in known:
        raise file.error(
            f"general.architecture must be one of {', '.join(known)}, got {architecture:.80}; "
            "transformers' own directory of the model may load"
        )
    family = known[architecture]
    assert family.gguf is not None
    return family.model_type, family.gguf


def config_of(file: GgufFile, model_type: str, family: Gguf) -> Any:
    """The file's transformers config.

    Raises:
        ModelFileError: a metadata key that is not known, missing, of another kind or out of range.
    """
    prefix = file.value("general.architecture", str) + "."
    _refuse_unknown(file, prefix, {*_SIZES, *_OTHER_KEYS, *family.keys})
    fields = {name: file.positive(prefix + key, int) for key, name in _SIZES.items()}
    _check_blocks(file, prefix, fields["num_hidden_layers"])
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = file.positive(prefix + "attention.key_length", int, max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := file.value(prefix + key, int, head_dim)) != head_dim:
            raise file.error(f"{prefix}{key} must be the head's {head_dim}, got {value}")
    heads_kv = file.positive(prefix + "attention.head_count_kv", int, heads)
    if heads % heads_kv:
        raise file.error(
            f"{prefix}attention.head_count must be a multiple of the key heads' {heads_kv}, got "
            f"{heads}"
        )
    for key, name in family.keys.items():
        if prefix + key in file.metadata:
            fields[name] = file.positive(prefix + key, float)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.error("tensor token_embd.weight is missing")
    ids = special_ids(file)
    with in_one_sentence(file.path, "its metadata fit no model of transformers"):
        from transformers import AutoConfig

        return AutoConfig.for_model(
            model_type,
            **fields,
            num_key_value_heads=heads_kv,
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
            rms_norm_eps=file.positive(prefix + "attention.layer_norm_rms_epsilon", float),
            rope_parameters=_rope_parameters(file, prefix),
            tie_word_embeddings="output.weight" not in file.tensors,
            **_biases(file, model_type),
            **{f"{name}_token_id": ids.get(name) for name in ("bos", "pad")},
            eos_token_id=list(eos_ids(file)) or None,
        )


def _refuse_unknown(file: GgufFile, prefix: str, known: set[str]) -> None:
    """Refuses what a model would be wrong without."""
    if file.value(prefix + "expert_count", int, 0):
        raise file.error("a mixture of experts is not supported")
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        is_ours = key.startswith(prefix) and name not in known
        if is_ours and value not in _NEUTRAL.get(name, ()):
            raise file.error(f"metadata key {key} = {value!r:.80} is not known here")


def _check_blocks(file: GgufFile, prefix: str, count: int) -> None:
    """Holds block_count to the tensors, before a model of so many layers is built."""
    numbers = {int(m[1]) for name in file.tensors if (m := re.match(r"blk\.(\d{1,9})\.", name))}
    there = max(numbers, default=-1) + 1
    if count != there:
        raise file.error(
            f"metadata key {prefix}block_count must be {there}, as the tensors' blocks are, got "
            f"{count}"
        )


def _rope_parameters(file: GgufFile, prefix: str) -> dict[str, Any]:
    theta = file.positive(prefix + "rope.freq_base", float, 10000.0)
    key = prefix + "rope.scaling.factor"
    if key not in file.metadata:
        key = prefix + "rope.scale_linear"  # its older name
    # As llama.cpp reads it: a factor whose type is not said is linear.
    implied = "linear" if key in file.metadata else "none"
    scaling = file.value(prefix + "rope.scaling.type", str, implied)
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": file.positive(key, float)}
    if scaling == "yarn":
        trained = file.positive(prefix + "context_length", int)
        original = prefix + "rope.scaling.original_context_length"
        found = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": file.positive(key, float),
            "original_max_position_embeddings": file.positive(original, int, trained),
        }
        for name in ("beta_fast", "beta_slow"):
            if (beta := f"{prefix}rope.scaling.yarn_{name}") in file.metadata:
                found[name] = file.positive(beta, float)
        return found
    raise file.error(f"{prefix}rope.scaling.type must be one of none, linear, yarn, got {scaling}")


def _biases(file: GgufFile, model_type: str) -> dict[str, bool]:
    """The config's words for biases that only some files of a family have."""
    if model_type not in ("llama", "granite"):
        return {}
    kinds = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
    return {field: f"blk.0.{name}.bias" in file.tensors for field, name in kinds.items()}
