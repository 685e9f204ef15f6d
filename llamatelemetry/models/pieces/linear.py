"""Linears as pieces compute them: few rows by our op, many by torch's own product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.models.opset import OpSet
from llamatelemetry.models.pieces.merge import is_plain
from llamatelemetry.models.pieces.side_by_side import linear_side_by_side
from llamatelemetry.models.pieces.watch import EVERYWHERE, SERVED
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.modules import QuantLinear
from llamatelemetry.quantization.rows import QuantisedRows, RowFormat
from llamatelemetry.quantization.w8a8 import W8A8Linear

Rows = Tensor | QuantisedRows  # what a linear takes: quantised ones where it says how

# Of more rows ops.linear is torch's product, which a call without our op reaches sooner, and over
# packed weights an activation is a launch of its own, of ops.gated too, which is not slower.
MOST_ROWS = 16


class Joined:
    """Linears over one input as one, and the activation after it if there is one.

    Args:
        merged: one linear that gives what the linears give side by side.
        linears: over the same input; none for merged alone.
        after: the activation of merged's output.
        activation: its name in ops.linear; None where after is not that alone, or has none.

    Attributes:
        takes: how it takes rows that are quantised already; None where it takes none.
    """

    def __init__(
        self,
        merged: Any,
        linears: Sequence[Any],
        ops: OpSet,
        after: Callable[[Tensor], Rows] | None = None,
        activation: str | None = None,
    ) -> None:
        self.merged, self.linears = merged, list(linears)
        self._forward, self._after, self._activation = merged.forward, after, activation
        self._ops, self._of_any_rows = ops, ops.linear_of_any_rows
        self._is_dense = ops.linear is not None and is_dense(merged)
        self._is_grouped = type(merged) is GroupLinear and merged.format in ops.group_formats
        is_packed = type(merged) in (QuantLinear, GroupLinear) and "forward" not in vars(merged)
        self._is_packed = is_packed and ops.activates_packed
        self.takes: RowFormat | None = merged.takes if type(merged) is W8A8Linear else None
        self._is_scaled = self.takes is not None and ops.scaled_linear is not None
        if self._of_any_rows and not (self._is_dense or self._is_grouped or self._is_scaled):
            kind = type(merged).__name__
            if isinstance(merged, GroupLinear):
                kind += f" of {merged.format}"
            formats = ", ".join(ops.group_formats) or "none"
            raise ValueError(
                "these ops take torch's Linear, W8A8Linear, or GroupLinear of "
                f"{formats}, got {kind}; load_model(dequantize=True) expands them, and the native "
                "ops take them packed"
            )

    def __call__(self, x: Rows) -> Any:
        # A graph reads the linears' own weights, wherever they lie when it runs.
        if torch.compiler.is_compiling():
            if self._is_dense and not self._of_any_rows and isinstance(x, Tensor):
                y = self._traced(x.contiguous())
                return y if self._activation is not None else self._followed(y)
            return self._followed(self._apart(x))
        if isinstance(x, QuantisedRows) or self._is_scaled:
            return self._followed(self._of_bytes(x, self.merged))
        if self._of_any_rows or (self._is_dense and _is_small(x)):
            y = self._by_op(x.contiguous(), self.merged, self._activation)
            return y if self._activation is not None else self._followed(y)
        if self._is_packed and self._activation is not None and _is_small(x):
            return self._forward(x, self._activation)
        return self._followed(self._forward(x))

    def added(self, x: Rows, residual: Tensor) -> Tensor:
        """residual and what the linear gives of x, in one launch where ops.linear serves it."""
        if self._is_dense and not self._of_any_rows and isinstance(x, Tensor) and _is_small(x):
            assert self._ops.linear is not None
            return self._ops.linear(x, self.merged.weight, self.merged.bias, residual, None)
        y: Tensor = self(x)
        return y.add_(residual)

    def _traced(self, x: Tensor) -> Tensor:
        if len(self.linears) < 2:
            return self._by_op(x, self.merged, self._activation)
        weights = [linear.weight for linear in self.linears]
        biases = [linear.bias for linear in self.linears if linear.bias is not None]
        return linear_side_by_side(x, weights, biases, self._activation)

    def _by_op(self, x: Tensor, linear: Any, activation: str | None) -> Tensor:
        if self._is_grouped:
            assert self._ops.group_linear is not None
            return self._ops.group_linear(x, linear, activation)
        assert self._ops.linear is not None
        return self._ops.linear(x, linear.weight, linear.bias, None, activation)

    def _of_bytes(self, x: Rows, linear: Any) -> Tensor:
        ops = self._ops
        if ops.scaled_linear is None:
            y: Tensor = linear.multiply(*x)
            return y
        if not isinstance(x, QuantisedRows):
            quantise = None if ops.quantising is None else ops.quantising.quantize_rows
            assert quantise is not None
            quantised = quantise(x.contiguous(), *linear.takes)
            x = QuantisedRows(*quantised, x.dtype)
        return ops.scaled_linear(x, linear)

    def _apart(self, x: Rows) -> Tensor:
        if isinstance(x, QuantisedRows) or self._is_scaled:
            parts = [self._of_bytes(x, one) for one in self.linears or [self.merged]]
            return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if self._of_any_rows:
            x, linears = x.contiguous(), self.linears or [self.merged]
            parts = [self._by_op(x, one, None) for one in linears]
            return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if len(self.linears) > 1:
            return torch.cat([linear(x) for linear in self.linears], -1)
        return self._forward(x)

    def _followed(self, y: Tensor) -> Rows:
        return y if self._after is None else self._after(y)


def head_of(module: Any, ops: OpSet) -> Callable[[Tensor], Tensor]:
    """What calls a model's vocabulary projection: by our op where nobody could tell."""
    if ops.linear_of_any_rows:
        return Joined(module, (), ops)
    if ops.linear is None or not is_dense(module):
        return module
    if any((module._forward_hooks, module._forward_pre_hooks, *EVERYWHERE)):
        return module
    return Joined(module, (), ops)


def is_dense(linear: Any) -> bool:
    """Whether a module is torch's linear and no more, of weights that our op can read."""
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    parameters = dict(linear.named_parameters())
    if parameters.keys() != {"weight", "bias"} - ({"bias"} if linear.bias is None else set()):
        return False  # pruned or parametrised: computed from other parameters
    if not all(map(is_plain, parameters.values())):
        return False
    return linear.weight.dtype in SERVED and linear.weight.stride(-1) == 1


def _is_small(x: Tensor) -> bool:
    return x.numel() <= MOST_ROWS * x.shape[-1]


def rows_after(
    after: Callable[[Tensor], Tensor], name: str | None, takes: RowFormat, ops: OpSet
) -> Callable[[Tensor], Rows]:
    """A gate and the quantisation of what it gives as one op, where there is one."""
    if name != "silu_and_mul" or ops.quantising is None:
        return after  # the linear quantises its rows itself
    quantise = ops.quantising.silu_and_mul
    return lambda y: QuantisedRows(*quantise(y, *takes), y.dtype)
