"""On which device a function will work, found before it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def device_of(function: Callable[..., Any], inputs: Mapping[str, Any] | None) -> torch.device:
    """The CUDA device of a function's tensors, else the CPU if it has any there.

    Looks at the inputs, then at the module or object that the function belongs to, then at the
    variables that it reads. A function that shows no tensor is taken to use the current device.
    """
    devices = [tensor.device for tensor in _tensors_of(function, inputs)]
    for device in devices:
        if device.type == "cuda":
            return device
    if devices or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _tensors_of(function: Callable[..., Any], inputs: Mapping[str, Any] | None) -> Iterator[Tensor]:
    yield from _tensors_in(dict(inputs or {}))
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        yield from _tensors_in((function.args, function.keywords))
        function = function.func
    yield from _tensors_in(function)
    owner = getattr(function, "__self__", None)
    if owner is not None:
        yield from _tensors_in(owner)
        yield from _tensors_in(getattr(owner, "__dict__", {}))
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if inspect.isfunction(plain):
        names = plain.__code__.co_names
        yield from _tensors_in([_cell(cell) for cell in plain.__closure__ or ()])
        yield from _tensors_in([plain.__globals__.get(name) for name in names])


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, nn.Module):
            yield from leaf.parameters()
            yield from leaf.buffers()
