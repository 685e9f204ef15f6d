"""Routed experts that files have one by one, and models as one module a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.quantization.experts import (
    PARTS,
    LinearExperts,
    expert_of,
    expert_sizes,
    fill_experts,
    is_known,
)


class LooseExperts:
    """Gathers a model's experts until those of a layer are whole, and puts them in their place."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._linears: dict[str, dict[tuple[int, str], nn.Module]] = {}

    def sizes_of(self, name: str) -> tuple[int, int] | None:
        """(out_features, in_features) of a linear of one expert; None where it is none of one.

        Raises:
            ValueError: the model's experts have biases.
        """
        if (found := expert_of(name)) is None:
            return None
        like = self._like(found[0])
        if not is_known(like):
            return None
        if getattr(like, "has_bias", False):
            raise ValueError("experts with biases must be in MXFP4")
        return expert_sizes(like, found[2])

    def put(self, name: str, linear: nn.Module) -> None:
        """Takes a linear that sizes_of knows; quantised ones become LinearExperts."""
        found = expert_of(name)
        assert found is not None
        experts, expert, part = found
        like, linears = self._like(experts), self._linears.setdefault(experts, {})
        linears[expert, part] = linear
        if linears.keys() != {(i, part) for i in range(like.num_experts) for part in PARTS}:
            return
        del self._linears[experts]
        if any(type(one) is not nn.Linear for one in linears.values()):
            self.model.set_submodule(experts, LinearExperts(like, linears))
            return
        weights: dict[str, list[Any]] = {part: [] for part in PARTS}
        for expert, part in sorted(linears):
            weights[part].append(linears.pop((expert, part)).weight)
        fill_experts(like, {f"{part}.weight": torch.stack(weights.pop(part)) for part in PARTS})

    def _like(self, experts: str) -> Any:
        try:
            return self.model.get_submodule(experts)
        except AttributeError:
            return None


def dense_linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """Of weights that are not quantised, [n, k], in dtype.

    Raises:
        ValueError: they are quantised, or no matrix.
    """
    if weight.dim() != 2 or weight.element_size() == 1:
        shape = list(weight.shape)
        raise ValueError(f"weight alone must be a matrix of floats, got {weight.dtype} {shape}")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    return linear
