"""A linear whose scales are a tensor of their own: what GPTQ and AWQ checkpoints become."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llamatelemetry import ops
from llamatelemetry.ops.formats import TILE_ROWS
from llamatelemetry.quantization.groups import GroupedWeight, unpack_groups


class GroupLinear(nn.Module):
    """``x[..., perm] @ weightᵀ + bias`` with ``weight = scale * (code - zero)``.

    Attributes:
        weight, scales, zeros: as in GroupedWeight
        perm: [in_features] int32, the order in which the columns were sorted; None for their own
        exact: float32 activations instead of int8 ones on the CPU
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: GroupedWeight,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        perm: Tensor | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.format = weight.format
        self.in_features, self.out_features, self.exact = in_features, out_features, exact
        self.register_buffer("weight", weight.packed)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("perm", perm)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.quant_linear(
            x,
            self.weight,
            self.format,
            self.out_features,
            self.bias,
            self.exact,
            self.scales,
            self.zeros,
            self.perm,
            activation,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupLinear:
        """Of .to(dtype) and the like: scales are data of the format and stay float32."""
        self.scales = self.scales.view(torch.int32)  # not floating, so moved and never converted
        try:
            super()._apply(fn, recurse)
        finally:
            self.scales = self.scales.view(torch.float32)
        return self

    def grouped(self) -> GroupedWeight:
        return GroupedWeight(self.weight, self.format, self.scales, self.zeros)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """nn.Linear with the same weights, expanded to dtype, its columns in their own order."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        values = unpack_groups(self.grouped(), self.out_features, self.in_features)
        if self.perm is not None:
            values = torch.empty_like(values).index_copy_(1, self.perm.long(), values)
        linear.weight = nn.Parameter(values.to(dtype), requires_grad=False)
        if self.bias is not None:  # a copy: its dtype may differ from ours
            bias = self.bias.detach().to(dtype, copy=True)
            linear.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        return linear

    def extra_repr(self) -> str:
        groups = self.scales.shape[1]
        size = "column" if groups == 1 else f"group {self.in_features // groups}"
        order = "" if self.perm is None else ", sorted columns"
        return (
            f"{self.in_features}, {self.out_features}, {self.format}, {size}{order}, "
            f"exact={self.exact}"
        )


def merge_group_linears(linears: Sequence[GroupLinear]) -> GroupLinear | None:
    """One linear whose output is the linears' outputs side by side; None if they are not alike.

    Alike: format, widths, groups, order of columns and choice of exact, biases in
    all or in none, and whole tiles of rows in all but the last. Weights, scales, zero points and
    biases become views of the merged ones, as in merge_quant_linears.
    """
    first = linears[0]
    for linear in linears:
        if (
            _kind(linear) != _kind(first)
            or not _equal(linear.perm, first.perm)
            or (linear is not linears[-1] and linear.out_features % TILE_ROWS)
        ):
            return None
    weight = GroupedWeight(
        _joined(linears, "weight"),
        first.format,
        _joined(linears, "scales"),
        None if first.zeros is None else _joined(linears, "zeros"),
    )
    rows = [linear.out_features for linear in linears]
    merged = GroupLinear(weight, first.in_features, sum(rows), perm=first.perm, exact=first.exact)
    if first.bias is not None:
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = torch.cat([part.data for part in biases])
        for part, view in zip(biases, bias.split(rows), strict=True):
            part.data = view
        merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged


def _joined(linears: Sequence[GroupLinear], name: str) -> Tensor:
    """Buffers of that name one under another; the linears keep views of it."""
    parts = [getattr(linear, name) for linear in linears]
    whole = torch.cat(parts)
    for linear, view in zip(linears, whole.split([len(part) for part in parts]), strict=True):
        setattr(linear, name, view)
    return whole


def _kind(linear: GroupLinear) -> tuple[object, ...]:
    groups = linear.scales.shape[1]
    return linear.format, linear.in_features, linear.exact, groups, linear.bias is None


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
