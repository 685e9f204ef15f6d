"""What save_pretrained writes of quantised linears: what load_model reads, or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.quantization.experts import LinearExperts, QuantExperts, expert_of, is_known
from llamatelemetry.quantization.group_files import Files, dense_names, files_of
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.modules import QuantEmbedding, QuantLinear
from llamatelemetry.quantization.rows import RowFormat
from llamatelemetry.quantization.w8a8 import W8A8Linear
from llamatelemetry.quantization.w8a8_config import quantization_config

_PACKED = (QuantLinear, QuantEmbedding, QuantExperts, LinearExperts)  # of files of their own
_QUANTISED = (W8A8Linear, GroupLinear, *_PACKED)
_BUFFERS = ("weight", "scales", "zeros", "perm")  # of GroupLinear


@dataclass(frozen=True)
class Origin:
    """What a model's modules do not tell of the files that it is of.

    Attributes:
        takes_rows: as files_of has it.
        lost: what no config.json has a field for; "" for nothing.
    """

    takes_rows: bool = False
    lost: str = ""


def describe_quantised(model: nn.Module, origin: Origin | None = None) -> None:
    """Has a transformers model's save_pretrained write quantised linears as load_model reads them,
    and refuse what it would not read. Of W8A8 linears the config says so from now on.

    Args:
        model: any module; without quantised ones, and nothing lost, save_pretrained is the class's.
        origin: of the model; None is that of an earlier call.
    """
    config: Any = getattr(model, "config", None)
    known = getattr(config, "quantization_config", None)
    if not hasattr(config, "to_dict") or not isinstance(known, (dict, NoneType)):
        return  # transformers has quantised the model itself
    if known is not None:
        del config.quantization_config
    if origin is not None:
        model.__dict__["_origin"] = origin
    kinds = _kinds(model)
    if not _is_quantised(model) and not _origin(model).lost:
        model.__dict__.pop("save_pretrained", None)
        return
    model.__dict__["save_pretrained"] = partial(_save, model)
    if kinds and _mixed(model) is None:
        config.quantization_config = quantization_config(kinds.pop(), dense_names(model))


def _save(model: Any, *args: Any, **named: Any) -> Any:
    """save_pretrained of a model's class.

    Raises:
        RuntimeError: load_model would not read what it writes.
    """
    describe_quantised(model)  # its modules may be others since
    given = inspect.signature(type(model).save_pretrained).bind(model, *args, **named)
    try:
        files = _files(model)
        state = _state(model, files)
        if files is not None and given.arguments.get("state_dict") is not None:
            raise ValueError("state_dict must be left out, for quantised linears are written anew")
        if given.arguments.get("save_original_format", True) and _is_quantised(model):
            _check_names(model, state)
    except ValueError as error:
        raise RuntimeError(f"save_pretrained: {error}") from None
    if files is None:
        return type(model).save_pretrained(*given.args, **given.kwargs)
    given.arguments["state_dict"] = state
    model.config.quantization_config = files.config
    try:
        return type(model).save_pretrained(*given.args, **given.kwargs)
    finally:
        describe_quantised(model)  # the config says what it said before


def _files(model: nn.Module) -> Files | None:
    """How its GroupLinears are kept; None where there are none.

    Raises:
        ValueError: for what is kept in no directory.
    """
    if lost := _origin(model).lost:
        raise ValueError(lost)
    if _kinds(model):
        if (reason := _mixed(model)) is not None:
            raise ValueError(reason)
        return _files_of_groups(model)
    for name, part in model.named_modules():
        if isinstance(part, _PACKED):
            raise ValueError(
                f"{name} is a {type(part).__name__}, and no directory holds its packed weights as "
                "they are; keep the files that it was loaded from, or load them with "
                "dequantize=True and save that"
            )
    return _files_of_groups(model)


def _files_of_groups(model: nn.Module) -> Files | None:
    if not any(isinstance(part, GroupLinear) for part in model.modules()):
        return None
    return files_of(model, _origin(model).takes_rows)


def _state(model: nn.Module, files: Files | None) -> dict[str, Tensor]:
    """The model's state_dict with GroupLinears as they are kept."""
    state = dict(model.state_dict())
    for name, part in model.named_modules():
        if files is not None and isinstance(part, GroupLinear):
            for buffer in _BUFFERS:
                state.pop(f"{name}.{buffer}", None)
            state |= {f"{name}.{key}": value for key, value in files.tensors_of(part).items()}
    return state


def _origin(model: nn.Module) -> Origin:
    found = model.__dict__.get("_origin")
    return found if isinstance(found, Origin) else Origin()


def _is_quantised(model: nn.Module) -> bool:
    return any(isinstance(part, _QUANTISED) for part in model.modules())


def _kinds(model: nn.Module) -> set[RowFormat]:
    return {part.takes for part in model.modules() if isinstance(part, W8A8Linear)}


def _mixed(model: nn.Module) -> str | None:
    """Why no one config names all formats of a model of W8A8 linears; None where it does."""
    kinds = _kinds(model)
    if len(kinds) > 1:
        said = sorted(
            f"{kind.dtype}" + ("" if kind.block is None else f" in blocks of {kind.block}")
            for kind in kinds
        )
        return f"W8A8 linears must all be of one format, got {' and '.join(said)}"
    for name, part in model.named_modules():
        if isinstance(part, _PACKED):
            return (
                f"W8A8 linears must be all that is quantised, got {name}, a {type(part).__name__}"
            )
    try:
        files = _files_of_groups(model)
    except ValueError as error:
        return str(error)
    if files is None or files.config == quantization_config(kinds.pop(), dense_names(model)):
        return None  # load_model makes both of one format, by the sizes of each
    return (
        "W8A8 linears must be all that is quantised, or of the format of the GroupLinears beside "
        "them, got others; load_model(dequantize=True) makes all that a directory holds dense"
    )


def _check_names(model: Any, state: Mapping[str, Tensor]) -> None:
    """Refuses what load_model would not find under the names that transformers writes.

    Raises:
        ValueError: with one of them.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # it writes the model's own names
        return
    own = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    for saved in revert_weight_conversion(model, dict(own)):
        name = file_name_in(model, saved)
        found = expert_of(name.removesuffix(".weight"))
        if name not in own and not (found and is_known(model.get_submodule(found[0]))):
            raise ValueError(
                f"transformers writes {type(model).__name__}'s weights under other names, as "
                f"{saved}, which load_model does not read; save_original_format=False keeps them"
            )


def file_name_in(model: nn.Module, name: str) -> str:
    """A tensor's name in a model: files of Mixtral's kind have another one for its MLPs."""
    if any(module.endswith("block_sparse_moe") for module, _ in model.named_modules()):
        return name
    return name.replace(".block_sparse_moe.", ".mlp.")
