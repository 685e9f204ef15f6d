"""The norm over the hidden size, where a module of its own is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.spec import LayerSpec


class RmsNorm(Piece):
    """``x / sqrt(mean(x²) + eps) * weight``."""

    def __init__(
        self, module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet = NATIVE
    ) -> None:
        super().__init__(module, spec, config, ops)
        self.eps = eps_of(module)
        self.bind()

    def bind(self) -> None:
        self.weight: Tensor = self.module.weight

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if (
            torch.is_grad_enabled() or self.changed()
        ):  # ours have no gradients; the module's forward has
            return self.original(*args, **kwargs)
        (x,) = self.named(args, kwargs).values()
        return self.ops.rms_norm(x.contiguous(), self.weight, self.eps)


def eps_of(norm: Any) -> float:
    return float(norm.variance_epsilon)
