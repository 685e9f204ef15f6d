"""Linears over one input as one op of a traced graph, which reads each linear's own weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llamatelemetry.models.pieces.merge import joined


@torch.library.custom_op("llamatelemetry_models::linear_side_by_side", mutates_args=())
def linear_side_by_side(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str | None
) -> Tensor:
    """ops.linear over weights one under another: one launch while they lie so in memory, as merged
    ones do; else they are copied together at each call.

    A graph cannot hold the merged weight itself: a parameter that is given other memory would not
    be followed there.

    Args:
        x: [..., k], as ops.linear takes it.
        weights: [n_i, k] each.
        biases: [n_i] each; empty without.
        activation: as in ops.linear.

    Returns:
        [..., sum of n_i], or half of that where gated.
    """
    bias = joined(biases) if biases else None
    y: Tensor = torch.ops.llamatelemetry.linear.default(x, joined(weights), bias, None, activation)
    return y


@linear_side_by_side.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str | None
) -> Tensor:
    n = sum(weight.shape[0] for weight in weights)
    is_gated = activation is not None and activation.endswith("_and_mul")
    return x.new_empty((*x.shape[:-1], n // 2 if is_gated else n))
