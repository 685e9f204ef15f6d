"""A transformers model around the packed weights of a GGUF file; nothing is expanded on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.loading.errors import in_one_sentence
from llamatelemetry.loading.gguf_config import config_of
from llamatelemetry.loading.gguf_file import GgufFile
from llamatelemetry.loading.gguf_place import Place
from llamatelemetry.loading.gguf_rope import FACTORS, TENSORS, rope_factors
from llamatelemetry.loading.gguf_rows import GgufRow, row_of_file
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear
from llamatelemetry.quantization.saving import Origin, describe_quantised

Progress = Callable[[int, int], None]


_NO_BIAS = ".self_attn.o_proj.bias"  # transformers' attention has it where the others have biases
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)")
_ONE_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight")  # older files


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

    row = row_of_file(file)
    config = config_of(file, row)
    with in_one_sentence(file.path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names, experts = _parameters(file, model, row), _expert_modules(model)
    place = Place(file, model, experts, device, dtype, exact)
    waiting = {name for name, _ in model.named_parameters()} - place.parameters_of_experts()
    total = sum(tensor.num_bytes for tensor in file.tensors.values())
    done = 0
    for tensor in file.tensors.values():
        if (match := _EXPERTS.fullmatch(tensor.name)) and int(match[1]) in experts:
            place.expert(tensor, int(match[1]), f"{match[2]}.{match[3]}")
        elif (match := _ONE_EXPERT.fullmatch(tensor.name)) and int(match[1]) in experts:
            place.expert(tensor, int(match[1]), f"{match[2]}.weight", int(match[3]))
        elif (path := _stack(tensor.name, row)) is not None:
            waiting -= place.stack(tensor, path)
        elif tensor.name not in TENSORS:
            name = names.get(tensor.name, "")
            if name not in waiting:
                raise file.unserved(
                    f"tensor {tensor.name} is no part of a {config.model_type} model"
                )
            waiting.remove(name)
            heads = _interleaved_heads(row, config, name)
            place.tensor(tensor, name, heads, row.one_added and name.endswith("norm.weight"))
        done += tensor.num_bytes
        if progress is not None:
            progress(done, total)
    waiting |= place.missing_of_experts()
    for name in [name for name in waiting if name.endswith(_NO_BIAS)]:
        module = model.get_submodule(name.removesuffix(".bias"))
        zeros = torch.zeros(module.out_features, dtype=dtype, device=device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
        waiting.remove(name)
    if waiting:
        raise file.error(f"the tensor for {min(waiting)} is missing")
    if config.tie_word_embeddings:
        _tie(model, exact)
    _make_buffers(file, model, config, device)
    lost = ""
    if FACTORS in file.tensors:
        lost = f"the model's tensor {FACTORS} has no field in a config.json; keep its GGUF file"
    describe_quantised(model, Origin(lost=lost))
    return model.eval()


def _parameters(file: GgufFile, model: nn.Module, row: GgufRow) -> dict[str, str]:
    """Parameters of the model, by the names that the gguf package has for their tensors."""
    import gguf

    architecture = file.metadata["general.architecture"]
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        raise file.error(
            f"the gguf package does not know {architecture}; pip install --upgrade gguf"
        )
    layers: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    known = gguf.get_tensor_name_map(numbers[architecture], layers)
    found = {}
    for name, _ in model.named_parameters():
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        if part in row.tensors:
            stored = f"blk.{layer}.{row.tensors[part]}"
        else:
            stored = known.get_name(name, try_suffixes=(".weight", ".bias")) or ""
        # A parameter that is no module's weight or bias is stored as a weight.
        found[stored if stored.endswith((".weight", ".bias")) else stored + ".weight"] = name
    return found


def _stack(tensor: str, row: GgufRow) -> str | None:
    """The list of modules whose weights are a tensor's rows, or None."""
    _, _, name = tensor.partition("blk.")
    layer, _, part = name.partition(".")
    return f"model.layers.{layer}.{row.stacks[part]}" if part in row.stacks else None


def _expert_modules(model: nn.Module) -> dict[int, str]:
    """Layer -> the name of its module of routed experts."""
    return {
        int(name.split(".")[2]): name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
    }


def _interleaved_heads(row: GgufRow, config: Any, name: str) -> int:
    """Heads in the rows of a tensor whose rows must be reordered, else 0."""
    if not row.interleaved:
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0)


def _make_buffers(file: GgufFile, model: Any, config: Any, device: torch.device) -> None:
    """What the skeleton has on meta beside its parameters."""
    rotary = type(model.model.rotary_emb)(config).to(device)
    if FACTORS in file.tensors:
        if not isinstance(getattr(rotary, "inv_freq", None), Tensor):
            raise file.error(f"tensor {FACTORS} is no part of a {config.model_type} model")
        rotary.inv_freq /= rope_factors(file, FACTORS, len(rotary.inv_freq)).to(device)
    model.model.rotary_emb = rotary
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            module = model.get_submodule(name.rpartition(".")[0])
            scale = getattr(module, "scalar_embed_scale", None)
            if not name.endswith(".embed_scale") or scale is None:
                raise file.error(f"transformers' {config.model_type} has a buffer {name}, unknown")
            module.embed_scale = torch.tensor(scale, device=device)


def _tie(model: Any, exact: bool) -> None:
    embedding = model.model.embed_tokens
    if isinstance(embedding, QuantEmbedding):
        model.lm_head = QuantLinear(
            embedding.weight, embedding.format, embedding.num_embeddings, exact=exact
        )
    else:
        model.lm_head.weight = embedding.weight
