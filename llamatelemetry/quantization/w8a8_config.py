"""What config.json says of a model of W8A8 linears, as other readers of its weights take it."""

from __future__ import annotations

from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import nn

from llamatelemetry.quantization.experts import LinearExperts, QuantExperts, expert_of, is_known
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear
from llamatelemetry.quantization.rows import RowFormat
from llamatelemetry.quantization.w8a8 import W8A8Linear

_OTHERS = (GroupLinear, QuantLinear, QuantEmbedding, QuantExperts, LinearExperts)

_KINDS = {
    torch.int8: ("int", "int-quantized"),
    torch.float8_e4m3fn: ("float", "float-quantized"),
}


def describe_w8a8(model: nn.Module) -> None:
    """Has a transformers model's config say how its linears are kept, for save_pretrained, which
    then refuses what load_model would not read. Without such linears nothing is said or refused."""
    config: Any = getattr(model, "config", None)
    known = getattr(config, "quantization_config", None)
    if not hasattr(config, "to_dict") or not isinstance(known, (dict, NoneType)):
        return  # transformers has quantised the model itself
    if known is not None:
        del config.quantization_config
    kinds = _kinds(model)
    if not kinds:
        model.__dict__.pop("save_pretrained", None)
        return
    model.__dict__["save_pretrained"] = partial(_save, model)
    if _mixed(model) is None:
        dense = [name for name, part in model.named_modules() if type(part) is nn.Linear]
        config.quantization_config = quantization_config(kinds.pop(), dense)


def _save(model: Any, *args: Any, **named: Any) -> Any:
    """save_pretrained of a model's class.

    Raises:
        RuntimeError: load_model would not read what it writes.
    """
    describe_w8a8(model)  # its modules may be others since
    if _kinds(model):
        reason = _mixed(model)
        if reason is None and named.get("save_original_format", True):
            reason = _renamed(model)
        if reason is not None:
            raise RuntimeError(f"save_pretrained: {reason}")
    return type(model).save_pretrained(model, *args, **named)


def _kinds(model: nn.Module) -> set[RowFormat]:
    return {part.takes for part in model.modules() if isinstance(part, W8A8Linear)}


def _mixed(model: nn.Module) -> str | None:
    """Why no one config names all formats of a model; None where it does."""
    kinds = _kinds(model)
    if len(kinds) > 1:
        said = sorted(
            f"{kind.dtype}" + ("" if kind.block is None else f" in blocks of {kind.block}")
            for kind in kinds
        )
        return f"W8A8 linears must all be of one format, got {' and '.join(said)}"
    for name, part in model.named_modules():
        if isinstance(part, _OTHERS):
            return (
                f"W8A8 linears must be all that is quantised, got {name}, a {type(part).__name__}"
            )
    return None


def _renamed(model: Any) -> str | None:
    """Why load_model would not find the weights under the names that transformers writes."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # it writes the model's own names
        return None
    own = {name: value.to("meta") for name, value in model.state_dict().items()}
    for saved in revert_weight_conversion(model, dict(own)):
        name = file_name_in(model, saved)
        found = expert_of(name.removesuffix(".weight"))
        if name not in own and not (found and is_known(model.get_submodule(found[0]))):
            return (
                f"transformers writes {type(model).__name__}'s weights under other names, as "
                f"{saved}, which load_model does not read; save_original_format=False keeps them"
            )
    return None


def file_name_in(model: nn.Module, name: str) -> str:
    """A tensor's name in a model: files of Mixtral's kind have another one for its MLPs."""
    if any(module.endswith("block_sparse_moe") for module, _ in model.named_modules()):
        return name
    return name.replace(".block_sparse_moe.", ".mlp.")


def quantization_config(kind: RowFormat, dense: list[str]) -> dict[str, Any]:
    """The field of that name: compressed-tensors' by token, or of blocks DeepSeek's fp8.

    Args:
        kind: how the linears take their rows.
        dense: names of the linears that are not quantised.
    """
    if kind.block is not None:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [kind.block, kind.block],
            "modules_to_not_convert": dense,
        }
    of_codes, format = _KINDS[kind.dtype]
    common = {"num_bits": 8, "type": of_codes, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": dense,
    }
