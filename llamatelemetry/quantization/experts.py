"""Routed experts over packed weights, in the place of transformers' module of dense ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry import ops
from llamatelemetry.ops.formats import TILE_ROWS, QuantFormat

PARTS = ("gate", "up", "down")
# Of a linear of one expert among others, and what files call the parts, Mixtral's last.
_ONE = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)")
_NAMES = dict(zip(("gate_proj", "up_proj", "down_proj", "w1", "w3", "w2"), PARTS * 2, strict=True))


class _Experts(nn.Module):
    """A layer's routed experts; each runs over the tokens that the router sent to it.

    Attributes:
        like: transformers' module, on meta: its activation, and how it lays out its parameters
    """

    like: Any

    def __init__(self, like: Any, num_experts: int) -> None:
        super().__init__()
        object.__setattr__(self, "like", like)  # no submodule: its parameters are not ours
        self.num_experts = num_experts

    def _linear(self, part: str, expert: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts give.

        Args:
            hidden_states: [tokens, hidden]
            top_k_index: [tokens, k] ids of experts; num_experts is none
            top_k_weights: [tokens, k]

        Returns:
            [tokens, hidden]
        """
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            x = hidden_states[token]
            gate, up = self._linear("gate", expert, x), self._linear("up", expert, x)
            joined = join(gate, up, -1, self.like.is_concatenated)
            x = self._linear("down", expert, self.like._apply_gate(joined))
            out.index_add_(0, token, (x * top_k_weights[token, place, None]).to(out.dtype))
        return out


class LinearExperts(_Experts):
    """Experts of three linears each, of any kind: what directories quantised one by one become.

    Attributes:
        gate, up, down: a linear for each expert
    """

    def __init__(self, like: Any, linears: Mapping[tuple[int, str], nn.Module]) -> None:
        """linears: (expert, part) -> linear, all of them."""
        super().__init__(like, len(linears) // len(PARTS))
        for part in PARTS:
            of_part = [linears[expert, part] for expert in range(self.num_experts)]
            self.add_module(part, nn.ModuleList(of_part))

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """transformers' module with the same weights, expanded to dtype."""
        parts = {}
        for part in PARTS:
            linears: Any = self.get_submodule(part)
            dense = [one.dense(dtype) if hasattr(one, "dense") else one for one in linears]
            parts[f"{part}.weight"] = torch.stack([one.weight.to(dtype) for one in dense])
        return fill_experts(self.like, parts)

    def _linear(self, part: str, expert: int, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(part)[expert](x)  # type: ignore[index]
        return out


def expert_of(name: str) -> tuple[str, int, str] | None:
    """(module of the experts, which one, part) of a linear's name; None where it is none of one."""
    found = _ONE.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), _NAMES[found[3]])


def is_known(like: Any) -> bool:
    """Whether a module of routed experts is laid out and gated in transformers' common way."""
    told = ("is_transposed", "is_concatenated", "_apply_gate")  # Llama 4's tells none of them
    has_weight = isinstance(getattr(like, "gate_up_proj", None), nn.Parameter)
    return has_weight and all(hasattr(like, name) for name in told)


def expert_sizes(like: Any, part: str) -> tuple[int, int]:
    """(out_features, in_features) of an expert's part in transformers' module of them."""
    weight = like.down_proj if part == "down" else like.gate_up_proj
    _, n, k = weight.mT.shape if like.is_transposed else weight.shape
    return (n, k) if part == "down" else (n // 2, k)


class QuantExperts(_Experts):
    """A layer's routed experts in three tensors of packed weights.

    Attributes:
        gate, up, down: [experts, ceil(n / 16), 16 * row_bytes] uint8, each expert's from
            ops.repack; or [experts, n, k] where the part is not quantised
        gate_bias, up_bias, down_bias: [experts, n] or None
        formats: part -> QuantFormat, or None where it is not quantised
        exact: float32 activations instead of int8 ones on the CPU
    """

    def __init__(
        self,
        like: Any,
        parts: Mapping[str, Tensor],
        formats: Mapping[str, QuantFormat | None],
        exact: bool = False,
    ) -> None:
        """parts: "gate.weight", "gate.bias", ... -> tensor."""
        super().__init__(like, int(parts["gate.weight"].shape[0]))
        self.formats, self.exact = dict(formats), exact
        self.sizes = {"gate": like.gate_up_proj.shape, "down": like.down_proj.shape}
        for part in PARTS:
            self.register_buffer(part, parts[f"{part}.weight"])
            self.register_buffer(f"{part}_bias", parts.get(f"{part}.bias"))

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """transformers' module with the same weights, expanded to dtype."""
        parts = {part: self._expanded(part).to(dtype) for part in PARTS}
        biases = {part: getattr(self, f"{part}_bias") for part in PARTS}
        return fill_experts(
            self.like,
            {f"{part}.weight": value for part, value in parts.items()}
            | {f"{part}.bias": b.to(dtype) for part, b in biases.items() if b is not None},
        )

    def _linear(self, part: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = getattr(self, part)[expert], getattr(self, f"{part}_bias")
        bias = None if bias is None else bias[expert]
        if (format := self.formats[part]) is None:
            return nn.functional.linear(x, weight, bias)
        return ops.quant_linear(x, weight, format, self._rows(part), bias, self.exact)

    def _rows(self, part: str) -> int:
        """The rows of an expert's matrix; packed tiles are whole, so they do not tell."""
        shape = self.sizes["down" if part == "down" else "gate"]
        rows = shape[2 if self.like.is_transposed else 1]
        return int(rows) if part == "down" else int(rows) // 2

    def _expanded(self, part: str) -> Tensor:
        weight = getattr(self, part)
        if (format := self.formats[part]) is None:
            return weight
        k = weight.shape[2] // (TILE_ROWS * format.block_bytes) * format.block_size
        rows = (ops.unpack(one, format, self._rows(part), k) for one in weight)
        return torch.stack([ops.dequantize(one, format, torch.float32) for one in rows])


def join(gate: Tensor, up: Tensor, dim: int, concatenated: bool) -> Tensor:
    """gate and up as one tensor along dim: one after the other, or taking turns."""
    if concatenated:
        return torch.cat((gate, up), dim)
    dim %= gate.dim()
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)


def fill_experts(like: Any, parts: Mapping[str, Tensor]) -> Any:
    """like, transformers' module of experts, with parameters of the parts.

    Args:
        like: its own parameters are replaced
        parts: "gate.weight" and so on, [experts, n, k] or, of biases, [experts, n]
    """
    found = {
        "gate_up_proj": join(parts["gate.weight"], parts["up.weight"], 1, like.is_concatenated),
        "down_proj": parts["down.weight"],
    }
    if like.is_transposed:
        found = {name: value.transpose(1, 2).contiguous() for name, value in found.items()}
    if like.has_bias:
        found["gate_up_proj_bias"] = join(
            parts["gate.bias"], parts["up.bias"], 1, like.is_concatenated
        )
        found["down_proj_bias"] = parts["down.bias"]
    for name, value in found.items():
        setattr(like, name, nn.Parameter(value, requires_grad=False))
    return like
