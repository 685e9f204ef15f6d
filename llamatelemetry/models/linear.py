"""Several linears over one input as one, without a second copy of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


def merge_linears(linears: Sequence[nn.Module]) -> nn.Module | None:
    """One linear whose output is the linears' outputs side by side; None if they are not alike.

    The parameters stay where they were registered and become views of the merged ones, so the
    state_dict keeps its keys and values, and loading into it reaches the merged linear.
    """
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    first = cast("nn.Linear", linears[0])
    names = [name for name, _ in first.named_parameters()]
    parameters = [dict(linear.named_parameters()) for linear in linears]
    for other in parameters:
        if list(other) != names:
            return None
        for name in names:
            like, tensor = parameters[0][name], other[name]
            if (tensor.dtype, tensor.device) != (like.dtype, like.device):
                return None
    merged = nn.Linear(first.in_features, 1, bias="bias" in names, device="meta")
    merged.out_features = sum(part["weight"].shape[0] for part in parameters)
    for name in names:
        whole = torch.cat([p[name].data for p in parameters])
        setattr(merged, name, nn.Parameter(whole, requires_grad=False))
        for part, view in zip(parameters, _pieces(whole, parameters, name), strict=True):
            part[name].data = view
    return merged


def unmerge_linears(linears: Sequence[nn.Module]) -> None:
    """Gives each linear a storage of its own again."""
    for linear in linears:
        for parameter in linear.parameters():
            parameter.data = parameter.data.clone()


def _pieces(
    whole: Tensor, parameters: Sequence[dict[str, nn.Parameter]], name: str
) -> tuple[Tensor, ...]:
    return whole.split([part[name].shape[0] for part in parameters])
