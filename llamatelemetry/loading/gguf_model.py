"""A transformers model around the packed weights of a GGUF file; nothing is expanded on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry import ops
from llamatelemetry.loading.errors import in_one_sentence
from llamatelemetry.loading.gguf_config import config_of, family_of_file
from llamatelemetry.loading.gguf_file import GgufFile, GgufTensor
from llamatelemetry.models.families import Gguf
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear

Progress = Callable[[int, int], None]


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
_NO_BIAS = ".self_attn.o_proj.bias"  # transformers' attention has it where the others have biases
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

    model_type, family = family_of_file(file)
    config = config_of(file, model_type, family)
    with in_one_sentence(file.path), torch.device("meta"):
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
    for name in [name for name in waiting if name.endswith(_NO_BIAS)]:
        module = model.get_submodule(name.removesuffix(".bias"))
        zeros = torch.zeros(module.out_features, dtype=dtype, device=device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
        waiting.remove(name)
    if waiting:
        raise file.error(f"the tensor for {min(waiting)} is missing")
    if config.tie_word_embeddings:
        _tie(model, exact)
    # The skeleton's rotary buffers are on meta too.
    rotary = type(model.model.rotary_emb)(config).to(device)
    if _ROPE_FACTORS in file.tensors:
        rotary.inv_freq /= _rope_factors(file, len(rotary.inv_freq)).to(device)
    model.model.rotary_emb = rotary
    return model.eval()


def _rope_factors(file: GgufFile, count: int) -> Tensor:
    """What the frequencies of the rotary embedding are divided by, [count] float32."""
    tensor = file.tensors[_ROPE_FACTORS]
    if tensor.format is not None or tensor.shape != (count,):
        kind = tensor.format.name if tensor.format else "dense"
        raise file.error(
            f"tensor {_ROPE_FACTORS} must be ({count},) and not quantised, got {tensor.shape}, "
            f"{kind}"
        )
    factors = file.dense(tensor).float()
    if not (factors.isfinite() & (factors > 0)).all():
        raise file.error(f"tensor {_ROPE_FACTORS} must hold positive and finite factors")
    return factors


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
