"""Norms: as functions that read their module's tensors, and as pieces where a module is called."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.linear import Rows
from llamatelemetry.models.spec import LayerSpec
from llamatelemetry.quantization.rows import QuantisedRows, RowFormat

EPS_NAMES = ("variance_epsilon", "eps")


class NormFunction:
    """What a norm's module computes, in one op; its tensors are read at every call."""

    def __init__(self, module: Any, kind: str, ops: OpSet) -> None:
        self.module, self.ops = module, ops
        self.is_rms = kind.startswith("rms")
        self.eps = eps_of(module)
        self.offset = offset_of(kind)

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        weight = getattr(module, "weight", None)
        if self.is_rms:
            return self.ops.rms_norm(x, weight, self.eps, self.offset)
        bias = getattr(module, "bias", None)
        return self.ops.layer_norm(x, weight, bias, self.eps, self.offset)

    def rows(self, x: Tensor, takes: RowFormat | None) -> Rows:
        """The norm as a linear that takes rows like that is best given it."""
        if takes is None or not self.is_rms or self.ops.quantising is None:
            return self(x)
        settings = (takes.dtype, self.eps, self.offset, takes.block)
        return QuantisedRows(
            *self.ops.quantising.rms_norm(x, self.module.weight, *settings), x.dtype
        )

    def after_add(self, x: Tensor, residual: Tensor, takes: RowFormat | None = None) -> Rows:
        """``residual += x``, and the norm of it, which may be in x, as rows has it."""
        if takes is not None and self.is_rms and self.ops.quantising is not None:
            quantise = self.ops.quantising.fused_add_rms_norm_
            settings = (takes.dtype, self.eps, self.offset, takes.block)
            return QuantisedRows(*quantise(x, residual, self.module.weight, *settings), x.dtype)
        if not self.is_rms:
            return self(residual.add_(x))
        self.ops.fused_add_rms_norm_(x, residual, self.module.weight, self.eps, self.offset)
        return x


class Norm(Piece):
    """A norm over the last dimension."""

    known = frozenset({*Piece.known, "input"})

    def __init__(
        self, module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet = NATIVE
    ) -> None:
        super().__init__(module, spec, config, ops)
        self.function = NormFunction(module, spec.norm, ops)
        self.eps, self.offset = self.function.eps, self.function.offset

    def numbers(self) -> list[tuple[Any, str]]:
        return [(self.module, name) for name in EPS_NAMES]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if self.stands_aside(args, kwargs):
            return self.run_original(*args, **kwargs)
        (x,) = self.named(args, kwargs).values()
        return self.function(x.contiguous())


class RmsNorm(Norm):
    """``x / sqrt(mean(x²) + eps) * (weight + offset)``."""


class LayerNorm(Norm):
    """``(x - mean(x)) / sqrt(variance(x) + eps) * (weight + offset) + bias``."""


def norm_piece(spec: LayerSpec) -> type[Norm]:
    """The piece for a family's norms."""
    return RmsNorm if spec.norm.startswith("rms") else LayerNorm


def eps_of(norm: Any) -> float:
    """A norm's eps, under either of transformers' names; layer norms without one have torch's."""
    for name in EPS_NAMES:
        if hasattr(norm, name):
            return float(getattr(norm, name))
    return 1e-5


def offset_of(kind: str) -> float:
    """What is added to the weight of a norm of this kind."""
    return float(kind.endswith("+1"))
