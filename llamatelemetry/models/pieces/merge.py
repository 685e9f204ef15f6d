"""Several linears over one input as one, without a second copy of their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack
from transformers.pytorch_utils import Conv1D

from llamatelemetry.quantization.group_linear import GroupLinear, merge_group_linears
from llamatelemetry.quantization.modules import QuantLinear, expand, merge_quant_linears
from llamatelemetry.quantization.w8a8 import W8A8Linear, merge_w8a8_linears


def merge_linears(linears: Sequence[nn.Module]) -> nn.Module | None:
    """One linear whose output is the linears' outputs side by side; None if they are not alike.

    One alone stays as it is. The weights stay where they were registered and become views of the
    merged ones, so the state_dict keeps its keys and values, and loading into it reaches the
    merged linear.
    """
    if len(linears) == 1:
        return linears[0]
    with plain_tensors():
        return _merge(linears)


def why_not_merged(linears: Sequence[nn.Module]) -> str:
    """What linears, which merge_linears gave None for, must be."""
    for linear in linears[:-1]:
        if isinstance(linear, W8A8Linear) and linear.out_features % (linear.takes.block or 1):
            return (
                f"must be whole blocks of {linear.takes.block} rows to become one linear, got "
                f"{linear.out_features}"
            )
    return "must be alike to become one linear"


def _merge(linears: Sequence[nn.Module]) -> nn.Module | None:
    if all(type(linear) is QuantLinear for linear in linears):
        return merge_quant_linears(cast("Sequence[QuantLinear]", linears))
    if all(type(linear) is GroupLinear for linear in linears):
        return merge_group_linears(cast("Sequence[GroupLinear]", linears))
    if all(type(linear) is W8A8Linear for linear in linears):
        return merge_w8a8_linears(cast("Sequence[W8A8Linear]", linears))
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    if not all(is_plain(p) for linear in linears for p in linear.parameters()):
        return None
    parts = [dict(linear.named_parameters()) for linear in linears]
    if len({tuple((name, p.dtype, p.device) for name, p in part.items()) for part in parts}) > 1:
        return None
    if "weight" not in parts[0]:  # pruned or parametrised: computed from other parameters
        return None
    out_features = sum(part["weight"].shape[0] for part in parts)
    in_features = parts[0]["weight"].shape[1]
    merged = nn.Linear(in_features, out_features, bias="bias" in parts[0], device="meta")
    for name in parts[0]:
        whole = joined([part[name].data for part in parts])
        views = whole.split([part[name].shape[0] for part in parts])
        for part, view in zip(parts, views, strict=True):
            if part[name].data_ptr() != view.data_ptr():
                part[name].data = view
        setattr(merged, name, nn.Parameter(whole, requires_grad=False))
    return merged


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one under another: what they are views of already, or a new tensor."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    storage = first.untyped_storage()
    end = storage.data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != end:
            return torch.cat(list(parts))
        end += part.nbytes
    if end - storage.data_ptr() != storage.nbytes():
        return torch.cat(list(parts))
    return first.as_strided((rows, *first.shape[1:]), first.stride(), 0)


def is_plain(tensor: Tensor) -> bool:
    """Whether a weight is memory and nothing else, so that others may take a view of it."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and type(tensor.data) is Tensor
        and tensor.layout == torch.strided
        and not tensor.is_meta
    )


def is_shared(tensor: Tensor, holders: int = 1) -> bool:
    """Whether more than so many tensors, itself among them, hold a weight's memory.

    Writes through one that is not ours would be lost to a merged copy.
    """
    storage = tensor.untyped_storage()
    count = getattr(torch._C, "_storage_Use_Count", None)
    # One use is the storage object at hand.
    return count is None or count(storage._cdata) > holders + 1


def merge_runs(linears: Sequence[nn.Module]) -> list[tuple[nn.Module, int]]:
    """As few linears as the neighbours among them allow, each with how many it stands for."""
    for count in range(len(linears), 1, -1):
        merged = merge_linears(linears[:count])
        if merged is not None:
            return [(merged, count), *merge_runs(linears[count:])]
    return [(linears[0], 1), *merge_runs(linears[1:])] if linears else []


def unmerge_linears(linears: Sequence[nn.Module]) -> None:
    """Gives each linear storages of its own again."""
    if len(linears) == 1:  # fused as it came
        return
    with plain_tensors():
        for linear in linears:
            if type(linear) not in (
                nn.Linear,
                QuantLinear,
                GroupLinear,
                W8A8Linear,
            ):  # never merged
                continue
            for parameter in linear.parameters():
                if is_plain(parameter) and _is_part(parameter):
                    parameter.data = parameter.data.clone()
            for name, buffer in list(linear.named_buffers()):
                if is_plain(buffer) and _is_part(buffer):
                    setattr(linear, name, buffer.clone())


def _is_part(tensor: Tensor) -> bool:
    """Whether it has only a part of its storage."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def apart(tensor: Tensor) -> Tensor:
    """A tensor with a storage of its own over the memory that a part of a merged one has."""
    if type(tensor) is not Tensor or not is_plain(tensor) or not _is_part(tensor):
        return tensor
    try:
        return from_dlpack(tensor)
    except (BufferError, RuntimeError):  # a dtype that torch does not hand over
        return tensor


class TensorsOf:
    """Where the tensors of a module lie, to be put back there whatever was merged meanwhile."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [(p, p.data) for p in module.parameters() if is_plain(p)]
        self._buffers = [
            (part, name, buffer)
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        with plain_tensors():
            for parameter, data in self._parameters:
                if is_plain(parameter) and parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
            for part, name, buffer in self._buffers:
                if getattr(part, name) is not buffer:
                    setattr(part, name, buffer)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made here can be trained later, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def rows_of(linear: Any) -> int:
    """How many features a linear gives, by its weight's shape where that says it."""
    if type(linear) is Conv1D:
        return linear.weight.shape[1]
    return linear.weight.shape[0] if type(linear) is nn.Linear else linear.out_features


def columns_of(linear: Any) -> int:
    """How many features a linear takes, by its weight's shape where that says it."""
    if type(linear) is Conv1D:
        return linear.weight.shape[0]
    return linear.weight.shape[1] if type(linear) is nn.Linear else linear.in_features


def in_more_bits(module: nn.Module, dtype: torch.dtype, config: Any) -> nn.Module:
    """A copy of module in dtype, quantised linears as dense ones of the weights they stand for.

    Args:
        config: is not copied, so the copy follows its changes
    """
    twin = copy.deepcopy(module, {id(config): config})
    expand(twin, dtype)
    return twin.to(dtype)
