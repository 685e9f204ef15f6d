"""The transformers config that a GGUF file's metadata describes, every value of it checked."""

from __future__ import annotations

import re
from typing import Any

from llamatelemetry.loading.errors import in_one_sentence
from llamatelemetry.loading.gguf_file import GgufFile
from llamatelemetry.loading.gguf_rope import rope_parameters
from llamatelemetry.loading.gguf_rows import GgufRow
from llamatelemetry.loading.tokenizer import eos_ids, special_ids

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
_PATTERN = "attention.sliding_window_pattern"
# keys that change nothing at these values, as if they were not there
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "expert_count": (0,),
    "expert_gating_func": (1,),  # softmax; the classes with another have it built in
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),  # -1 is llama.cpp's word for its default, 1 in yarn
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


def config_of(file: GgufFile, row: GgufRow) -> Any:
    """The file's transformers config.

    Raises:
        ModelFileError: a metadata key that is not known, missing, of another kind or out of range.
    """
    prefix = file.value("general.architecture", str) + "."
    _refuse_unknown(file, prefix, row)
    fields: dict[str, Any] = dict(row.fixed)
    fields |= {name: file.positive(prefix + key, int) for key, name in _SIZES.items()}
    _check_blocks(file, prefix, fields["num_hidden_layers"])
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = file.positive(prefix + "attention.key_length", int, max(width // heads, 1))
    if (value := file.value(prefix + "attention.value_length", int, head_dim)) != head_dim:
        raise file.error(
            f"{prefix}attention.value_length must be the head's {head_dim}, got {value}"
        )
    heads_kv = file.positive(prefix + "attention.head_count_kv", int, heads)
    if heads % heads_kv:
        raise file.error(
            f"{prefix}attention.head_count must be a multiple of the key heads' {heads_kv}, got "
            f"{heads}"
        )
    fields |= _of_keys(file, prefix, row)
    if row.wide_scale_at:
        wide = fields["num_hidden_layers"] == row.wide_scale_at
        fields["query_pre_attn_scalar"] = width // heads if wide else head_dim
    if row.window:
        fields |= _window(file, prefix, row, fields["num_hidden_layers"])
    fields |= rope_parameters(file, prefix, row, head_dim)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.error("tensor token_embd.weight is missing")
    ids = special_ids(file)
    with in_one_sentence(file.path, "its metadata fit no model of transformers"):
        from transformers import AutoConfig

        return AutoConfig.for_model(
            row.model_type,
            **fields,
            num_key_value_heads=heads_kv,
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
            tie_word_embeddings="output.weight" not in file.tensors,
            **{f"{name}_token_id": ids.get(name) for name in ("bos", "pad")},
            eos_token_id=list(eos_ids(file)) or None,
        )


def _of_keys(file: GgufFile, prefix: str, row: GgufRow) -> dict[str, Any]:
    """The fields that only some architectures have."""
    fields: dict[str, Any] = {}
    for names, kind in ((row.sizes, int), (row.numbers, float)):
        for key, name in names.items():
            if prefix + key in file.metadata:
                off = file.metadata[prefix + key] in _NEUTRAL.get(key, ())
                fields[name] = None if off else file.positive(prefix + key, kind)
    key, name = row.epsilon
    fields[name] = file.positive(prefix + key, float)
    fields |= {name: f"blk.0.{tensor}" in file.tensors for name, tensor in row.has.items()}
    fields |= {name: f"blk.0.{tensor}" not in file.tensors for name, tensor in row.lacks.items()}
    return fields


def _window(file: GgufFile, prefix: str, row: GgufRow, layers: int) -> dict[str, Any]:
    """sliding_window, and layer_types where layers differ."""
    key, of_layers = prefix + "attention.sliding_window", prefix + _PATTERN
    window = None if file.metadata.get(key, 0) == 0 else file.positive(key, int)
    if not row.full_every:
        return {"sliding_window": window}
    pattern = file.metadata.get(of_layers, row.full_every)
    if isinstance(pattern, list):
        slides = file.values(of_layers, bool)
        if len(slides) != layers:
            raise file.error(
                f"metadata key {of_layers} must have a value for each of the {layers} blocks, got "
                f"{len(slides)}"
            )
    else:
        every = file.positive(of_layers, int, row.full_every)
        slides = [(layer + 1) % every != 0 for layer in range(layers)]
    kinds = ("full_attention", "sliding_attention")
    types = [kinds[window is not None and slides[layer]] for layer in range(layers)]
    return {"sliding_window": window, "layer_types": types}


def _refuse_unknown(file: GgufFile, prefix: str, row: GgufRow) -> None:
    """Refuses what a model would be wrong without."""
    if file.value(prefix + "expert_count", int, 0) and not row.experts:
        raise file.unserved("a mixture of experts is not supported for this architecture")
    known = {*_SIZES, *_OTHER_KEYS, *row.sizes, *row.numbers, *row.unread, *row.rope_keys}
    known.add(row.epsilon[0])
    if row.window:
        known |= {"attention.sliding_window", _PATTERN}
    if row.sliding_rope is not None:
        known.add("rope.freq_base_swa")
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        is_ours = key.startswith(prefix) and name not in known
        if is_ours and value not in _NEUTRAL.get(name, ()):
            raise file.unserved(f"metadata key {key} = {value!r:.80} is not known here")


def _check_blocks(file: GgufFile, prefix: str, count: int) -> None:
    """Holds block_count to the tensors, before a model of so many layers is built."""
    numbers = {int(m[1]) for name in file.tensors if (m := re.match(r"blk\.(\d{1,9})\.", name))}
    there = max(numbers, default=-1) + 1
    if count != there:
        raise file.error(
            f"metadata key {prefix}block_count must be {there}, as the tensors' blocks are, got "
            f"{count}"
        )
