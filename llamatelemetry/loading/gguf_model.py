"""A transformers model around the packed weights of a GGUF file; nothing is expanded on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry import ops
from llamatelemetry.loading.gguf_file import GgufFile, GgufTensor
from llamatelemetry.loading.tokenizer import eos_ids, special_ids
from llamatelemetry.models.families import Gguf, architectures
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear

Progress = Callable[[int, int], None]


# metadata keys, less the architecture -> config fields
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
# read in _config, or implied by the tensors
_OTHER_KEYS = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "expert_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.type",
    "rope.scaling.original_context_length",
    "vocab_size",
    "tensor_data_layout",
}
# tensor names, less "blk.N." or ".weight" -> modules
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FACTORS = "rope_freqs.weight"


def build_model(
    file: GgufFile,
    device: torch.device,
    dtype: torch.dtype,
    exact: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The file's model as a transformers causal language model in eval mode.

    Args:
        device: where the weights go
        dtype: of activations, norms and tensors that the file does not quantise
        exact: float32 activations in the quantised linears instead of int8 ones on the CPU
        progress: called with (bytes done, bytes in all) after each tensor

    Returns:
        quantised linears as QuantLinear, a quantised embedding as QuantEmbedding

    Raises:
        ModelFileError: an architecture, a metadata key or a tensor that no row here knows, or one
            that is missing
    """
    from transformers import AutoModelForCausalLM

    model_type, family = _family(file)
    config = _config(file, model_type, family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    waiting = {name for name, _ in model.named_parameters()}
    total = sum(tensor.num_bytes for tensor in file.tensors.values())
    done = 0
    for tensor in file.tensors.values():
        if tensor.name != _ROPE_FACTORS:
            name = _parameter_name(file, tensor)
            if name not in waiting:
                raise file.error(f"tensor {tensor.name} is no part of a {config.model_type} model")
            waiting.remove(name)
            heads = _interleaved_heads(family, config, name)
            _place(file, tensor, model, name, heads, device, dtype, exact)
            file.release(tensor)
        done += tensor.num_bytes
        if progress is not None:
            progress(done, total)
    if waiting:
        raise file.error(f"the tensor for {min(waiting)} is missing")
    if config.tie_word_embeddings:
        _tie(model, exact)
    # The skeleton's rotary buffers are on meta too.
    rotary = type(model.model.rotary_emb)(config).to(device)
    if _ROPE_FACTORS in file.tensors:
        rotary.inv_freq /= file.dense(file.tensors[_ROPE_FACTORS]).to(device, torch.float32)
    model.model.rotary_emb = rotary
    return model.eval()


def _family(file: GgufFile) -> tuple[str, Gguf]:
    """transformers' model_type for the file's architecture, and what is particular in files."""
    architecture, known = file.value("general.architecture", str), architectures()
    if architecture not in known:
        raise file.error(
            f"general.architecture must be one of {', '.join(known)}, got {architecture}"
        )
    family = known[architecture]
    assert family.gguf is not None
    return family.model_type, family.gguf


def _config(file: GgufFile, model_type: str, family: Gguf) -> Any:
    from transformers import AutoConfig

    prefix = file.metadata["general.architecture"] + "."
    known = {*_SIZES, *_OTHER_KEYS, *family.keys}
    for key, value in file.metadata.items():
        if key.startswith(prefix) and key[len(prefix) :] not in known:
            raise file.error(f"metadata key {key} = {value!r:.80} is not known here")
    if file.value(prefix + "expert_count", int, 0):
        raise file.error("a mixture of experts is not supported")

    fields = {name: file.value(prefix + key, int) for key, name in _SIZES.items()}
    heads = fields["num_attention_heads"]
    head_dim = file.value(prefix + "attention.key_length", int, fields["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := file.value(prefix + key, int, head_dim)) != head_dim:
            raise file.error(f"{prefix}{key} must be the head's {head_dim}, got {value}")
    for key, name in family.keys.items():
        if prefix + key in file.metadata:
            fields[name] = file.value(prefix + key, float)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.error("tensor token_embd.weight is missing")
    return AutoConfig.for_model(
        model_type,
        **fields,
        num_key_value_heads=file.value(prefix + "attention.head_count_kv", int, heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        rms_norm_eps=file.value(prefix + "attention.layer_norm_rms_epsilon", float),
        rope_parameters=_rope_parameters(file, prefix),
        tie_word_embeddings="output.weight" not in file.tensors,
        **{f"{name}_token_id": special_ids(file).get(name) for name in ("bos", "pad")},
        eos_token_id=list(eos_ids(file)) or None,
    )


def _rope_parameters(file: GgufFile, prefix: str) -> dict[str, Any]:
    theta = file.value(prefix + "rope.freq_base", float, 10000.0)
    scaling = file.value(prefix + "rope.scaling.type", str, "none")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        factor = file.value(prefix + "rope.scaling.factor", float)
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise file.error(f"{prefix}rope.scaling.type must be one of none, linear, got {scaling}")


def _parameter_name(file: GgufFile, tensor: GgufTensor) -> str:
    stem, _, attribute = tensor.name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        layer, stem = f"model.layers.{match[1]}.", match[2]
        module = _LAYER_MODULES.get(stem)
    else:
        layer, module = "", _MODULES.get(stem)
    if module is None:
        raise file.error(f"tensor {tensor.name} has no place in a transformers model here")
    return f"{layer}{module}.{attribute}"


def _interleaved_heads(family: Gguf, config: Any, name: str) -> int:
    """Heads in the rows of a tensor whose rows must be reordered, else 0."""
    if not family.interleaved:
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0)


def _place(
    file: GgufFile,
    tensor: GgufTensor,
    model: nn.Module,
    name: str,
    heads: int,
    device: torch.device,
    dtype: torch.dtype,
    exact: bool,
) -> None:
    """Puts the tensor where the parameter of that name is, packed if the file has it quantised."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    expected = tuple(getattr(module, attribute).shape)
    if tensor.shape != expected:
        raise file.error(f"tensor {tensor.name} must be {expected}, got {tensor.shape}")
    if tensor.format is None:
        values = _neox_order(file.dense(tensor), heads).to(device, dtype, copy=True)
        setattr(module, attribute, nn.Parameter(values, requires_grad=False))
        return
    packed = ops.repack(_neox_order(file.rows(tensor), heads).to(device), tensor.format)
    replacement: nn.Module
    if isinstance(module, nn.Linear):
        replacement = QuantLinear(packed, tensor.format, expected[0], module.bias, exact)
    elif isinstance(module, nn.Embedding):
        replacement = QuantEmbedding(packed, tensor.format, expected[0], dtype)
    else:
        raise file.error(f"tensor {tensor.name} must not be quantised, got {tensor.format.name}")
    model.set_submodule(path, replacement)


def _neox_order(rows: Tensor, heads: int) -> Tensor:
    """Rows (2i, 2i + 1) of each head, which one angle turns, to (i, i + head_dim / 2)."""
    if not heads:
        return rows
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _tie(model: Any, exact: bool) -> None:
    embedding = model.model.embed_tokens
    if isinstance(embedding, QuantEmbedding):
        model.lm_head = QuantLinear(
            embedding.weight, embedding.format, embedding.num_embeddings, exact=exact
        )
    else:
        model.lm_head.weight = embedding.weight
