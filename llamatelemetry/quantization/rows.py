"""Rows of a byte a value on their way to W8A8 linears, and the ops that make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import llamatelemetry._native.kernels  # noqa: F401  loads the libraries, which define the ops


class RowFormat(NamedTuple):
    """How a W8A8 linear takes its rows: int8 or float8_e4m3fn, and what shares a scale."""

    dtype: torch.dtype
    block: int | None  # 128 values of a row, or None for a row


class QuantisedRows(NamedTuple):
    """Rows that are quantised already: what the ops that quantise give, and the dtype before."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


class Quantising(NamedTuple):
    """Ops that quantise the rows they make, with the signatures of llamatelemetry.ops."""

    rms_norm: Callable[..., tuple[Tensor, Tensor]]
    fused_add_rms_norm_: Callable[..., tuple[Tensor, Tensor]]
    silu_and_mul: Callable[..., tuple[Tensor, Tensor]]
    # Of rows that nothing else makes; without it W8A8Linear does it.
    quantize_rows: Callable[..., tuple[Tensor, Tensor]] | None = None


_ops = torch.ops.llamatelemetry
NATIVE_QUANTISING = Quantising(
    _ops.rms_norm_quantize.default,
    _ops.fused_add_rms_norm_quantize_.default,
    _ops.silu_and_mul_quantize.default,
)
