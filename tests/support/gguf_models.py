"""Small GGUF files written by the gguf package, and the transformers models they should give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from gguf.quants import dequantize
from gguf_rows import gguf_rows
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from llamatelemetry.ops import QuantFormat

TEXT = "the cat sat on the mat, and then 2024 cats sat on that mat: it's what they'll do\n\n" * 3
CONTROL, USER_DEFINED = 3, 4

# Whole blocks of 256 everywhere, and grouped queries.
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
_GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "granite": ("Granite", _GRANITE),
}


@dataclass
class Vocabulary:
    """Tokens and merges of a byte-level encoding trained on TEXT, special tokens at the end."""

    tokens: list[str]
    merges: list[str]
    special: Sequence[str] = ("<|bos|>", "<|eos|>")
    types: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.types = [1] * len(self.tokens) + [CONTROL] * len(self.special)
        self.tokens = [*self.tokens, *self.special]

    def id(self, token: str) -> int:
        return self.tokens.index(token)


def byte_level_vocabulary() -> Vocabulary:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return Vocabulary(tokens, merges)


def add_tokenizer(
    writer: gguf.GGUFWriter, vocabulary: Vocabulary, model: str = "gpt2", pre: str = "smollm"
) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.id("<|bos|>"))
    writer.add_eos_token_id(vocabulary.id("<|eos|>"))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    family: str = "llama",
    format: QuantFormat | None = QuantFormat.Q8_0,
    tied: bool = True,
    without: Sequence[str] = (),
    extra: Any = lambda writer: None,
) -> Any:
    """Writes a random model and returns transformers' model of the same weights in float32.

    format:  of every matrix; None writes them as float16
    without: tensors and metadata keys left out
    extra:   called with the writer, to add to the file or change it
    """
    name, options = FAMILIES[family]
    vocabulary = byte_level_vocabulary()
    options = {**_SIZES, **options, "vocab_size": len(vocabulary.tokens)}
    config = getattr(transformers, f"{name}Config")(
        **options, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None
    )
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    writer = gguf.GGUFWriter(path, family)
    _add_sizes(writer, config, family)
    add_tokenizer(writer, vocabulary)
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for parameter_name, parameter in reference.named_parameters():
        stored = names.get_name(parameter_name, try_suffixes=(".weight", ".bias"))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        interleave = heads.get(stored.split(".")[-2], 0) if family in ("llama", "granite") else 0
        if stored not in without:
            _add_parameter(writer, stored, parameter, format, interleave)
    extra(writer)
    for key in without:
        writer.kv_data[0].pop(key, None)
    finish(writer)
    return reference


def _add_sizes(writer: gguf.GGUFWriter, config: Any, family: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _add_parameter(
    writer: gguf.GGUFWriter,
    name: str,
    parameter: Tensor,
    format: QuantFormat | None,
    interleave: int,
) -> None:
    """Fills the parameter with what the file will hold, rows of q and k interleaved there."""
    if parameter.ndim == 1:
        # Small norms keep the attention soft, and with it the rounding errors tame.
        values = torch.randn_like(parameter) * 0.03 + 0.1
        parameter.copy_(values)
        writer.add_tensor(name, interleaved(values, interleave).numpy())
    elif format is None:
        values = (torch.randn_like(parameter) * 0.1).half()
        parameter.copy_(values)
        writer.add_tensor(name, interleaved(values, interleave).numpy())
    else:
        rows = gguf_rows(format, *parameter.shape)
        ggml_type = gguf.GGMLQuantizationType[format.name]
        parameter.copy_(torch.from_numpy(dequantize(rows.numpy(), ggml_type)))
        writer.add_tensor(name, interleaved(rows, interleave).numpy(), raw_dtype=ggml_type)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's permute: the two halves of each head's rows zipped together."""
    if not heads:
        return rows
    first, second = rows.view(heads, 2, -1, *rows.shape[1:]).unbind(1)
    return torch.stack((first, second), 2).reshape(rows.shape).contiguous()
