"""A small GGUF file of every architecture, as llama.cpp's conversion would write it, and the
transformers model of the same weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from gguf.quants import dequantize, quantize
from gguf_arch_rows import ARCHS, SIZES
from gguf_models import add_tokenizer, byte_level_vocabulary, finish, interleaved
from torch import Tensor


def write_arch(
    path: Path, key: str, packed: bool, extra: Callable[[gguf.GGUFWriter], None] | None = None
) -> Any:
    """Writes a random model; returns transformers' model of the same weights in float32.

    Args:
        packed: every matrix in Q8_0, else all in float32
        extra: called with the writer, to change the file
    """
    arch = ARCHS[key]
    vocabulary = byte_level_vocabulary()
    config = getattr(transformers, f"{arch.cls}Config")(
        **{**SIZES, **arch.options},
        vocab_size=len(vocabulary.tokens),
        tie_word_embeddings=arch.tied,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    name = arch.name or key
    writer = gguf.GGUFWriter(path, name)
    _add_sizes(writer, config)
    add_tokenizer(writer, vocabulary)
    arch.meta(writer, config)
    number = next(n for n, a in gguf.MODEL_ARCH_NAMES.items() if a == name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for parameter, tensor in list(model.named_parameters()):
        for stored, values in _split(parameter, tensor, model, arch.one_by_one):
            stem = _stored_name(names, stored)
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            turn = heads.get(stem.split(".")[-2], 0) if arch.permuted else 0
            _add(writer, stem, values, packed, turn, arch.one_added and "norm" in stem)
    writer.kv_data[0].pop("tokenizer.ggml.eos_token_id")  # texts of a given length
    if extra is not None:
        extra(writer)
    finish(writer)
    return model


def _stored_name(names: gguf.TensorNameMap, parameter: str) -> str:
    if match := re.fullmatch(r"(.*)\.(\d+)", parameter):  # of one expert
        whole = _stored_name(names, match[1])
        return whole.replace("_exps.", f".{match[2]}.")
    stem = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    assert stem, parameter
    return stem if stem.endswith((".weight", ".bias")) else f"{stem}.weight"


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(SIZES["head_dim"])
    writer.add_value_length(SIZES["head_dim"])
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(SIZES["head_dim"] * share))
    writer.add_rope_freq_base(rope["rope_theta"])
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.norm_epsilon)


def _split(name: str, tensor: Tensor, model: Any, apart: bool) -> list[tuple[str, Tensor]]:
    """The tensors of a file that a parameter is in, as views of it; one but for experts.

    Args:
        apart: whether each expert has tensors of its own.
    """
    if apart and ".experts." in name:
        whole = _split(name, tensor, model, False)
        return [(f"{n}.{i}", one) for n, values in whole for i, one in enumerate(values)]
    name = name.replace("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight")
    if match := re.fullmatch(r"(.*)\.norms\.(\d+)\.weight", name):
        return _norms_of_heads(match[1], model) if match[2] == "0" else []
    if ".experts." not in name:
        return [(name, tensor)]
    path, _, last = name.rpartition(".")
    kind = "bias" if last.endswith("_bias") else "weight"
    gpt_oss = model.config.model_type == "gpt_oss"
    if gpt_oss and kind == "weight":
        tensor = tensor.transpose(1, 2)
    path = path.replace("block_sparse_moe", "mlp")
    if last.startswith("down"):
        return [(f"{path}.down_proj.{kind}", tensor)]
    half = tensor.shape[1] // 2
    gate, up = (tensor[:, ::2], tensor[:, 1::2]) if gpt_oss else tensor.split(half, 1)
    return [(f"{path}.gate_proj.{kind}", gate), (f"{path}.up_proj.{kind}", up)]


def _norms_of_heads(path: str, model: Any) -> list[tuple[str, Tensor]]:
    """The weights of a norm for each head as views of one tensor."""
    norms = model.get_submodule(f"{path}.norms")
    whole = torch.empty(len(norms), *norms[0].weight.shape)
    for norm, row in zip(norms, whole, strict=True):
        norm.weight = torch.nn.Parameter(row, requires_grad=False)
    return [(f"{path}.weight", whole)]


def _add(
    writer: gguf.GGUFWriter, name: str, tensor: Tensor, packed: bool, turn: int, one_added: bool
) -> None:
    """Fills the parameter with random values that the file can hold, and the file with them."""
    norm = "norm" in name
    values = torch.randn(tensor.shape) * (0.1 if tensor.ndim == 1 else 0.3)
    if norm:
        values = values + (0.0 if one_added else 1.0)
    if one_added:
        values = values + 1.0
    if not (packed and tensor.ndim > 1 and not norm) or "gate_inp" in name or "bias" in name:
        stored = values.squeeze() if "shexp" in name else values
        writer.add_tensor(name, interleaved(stored, turn).numpy())
        tensor.copy_(values - 1.0 if one_added else values)
        return
    type = gguf.GGMLQuantizationType.Q8_0
    rows = quantize(values.numpy(), type)
    tensor.copy_(torch.from_numpy(dequantize(rows, type)))
    writer.add_tensor(name, interleaved(torch.from_numpy(rows), turn).numpy(), raw_dtype=type)
