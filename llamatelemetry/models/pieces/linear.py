"""Linears as pieces compute them: few rows by our op, many by torch's own product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.models.opset import OpSet
from llamatelemetry.models.pieces.merge import is_plain
from llamatelemetry.models.pieces.watch import EVERYWHERE, SERVED

# Of more rows ops.linear is torch's product, which a call without our op reaches sooner.
MOST_ROWS = 16


class Joined:
    """Linears over one input as one, and the activation after it if there is one.

    Args:
        merged: one linear that gives what the linears give side by side.
        linears: over the same input; none for merged alone.
        after: the activation of merged's output.
        activation: its name in ops.linear; None where that has none.
    """

    def __init__(
        self,
        merged: Any,
        linears: Sequence[Any],
        ops: OpSet,
        after: Callable[[Tensor], Tensor] | None = None,
        activation: str | None = None,
    ) -> None:
        self.merged, self.linears = merged, list(linears)
        self._forward, self._after, self._activation = merged.forward, after, activation
        self._op = ops.linear if is_dense(merged) else None
        self._of_any_rows = ops.linear_of_any_rows
        if self._of_any_rows and self._op is None:
            raise ValueError(
                f"these ops take torch's Linear alone, got {type(merged).__name__}; load the "
                "weights dense, or use the native ops"
            )

    def __call__(self, x: Tensor) -> Tensor:
        # A graph reads the linears' own weights, wherever they lie when it runs.
        if torch.compiler.is_compiling():
            return self._followed(self._apart(x))
        if self._op is not None and (self._of_any_rows or _is_small(x)):
            weight, bias = self.merged.weight, self.merged.bias
            y = self._op(x.contiguous(), weight, bias, None, self._activation)
            return y if self._activation is not None else self._followed(y)
        return self._followed(self._forward(x))

    def _apart(self, x: Tensor) -> Tensor:
        if self._of_any_rows and self._op is not None:
            op, x = self._op, x.contiguous()
            linears = self.linears or [self.merged]
            parts = [op(x, one.weight, one.bias, None, None) for one in linears]
            return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if len(self.linears) > 1:
            return torch.cat([linear(x) for linear in self.linears], -1)
        return self._forward(x)

    def _followed(self, y: Tensor) -> Tensor:
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
