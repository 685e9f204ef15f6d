"""The MLPs: gated, and with one linear before the activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from llamatelemetry.models.opset import ACTIVATIONS, GATED, NATIVE, OpSet
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.linear import Joined, Rows, is_dense, rows_after
from llamatelemetry.models.pieces.merge import merge_linears, unmerge_linears, why_not_merged
from llamatelemetry.models.spec import LayerSpec


class _Mlp(Piece):
    """What both have in common: an activation that the ops have, and a linear on either side."""

    into: Joined  # up to the activation and with it
    down: Joined

    def __init__(
        self, module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet = NATIVE
    ) -> None:
        super().__init__(module, spec, config, ops)
        self.activation = getattr(config, spec.activation)
        known = self.activations()
        if self.activation not in known:
            raise ValueError(f"activation must be one of {sorted(known)}, got {self.activation!r}")
        self.bind()

    def activations(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        raise NotImplementedError

    def step(self, x: Rows) -> Tensor:
        return self.ops.all_reduce(self.down(self.into(x)))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if self.stands_aside(args, kwargs):
            return self.run_original(*args, **kwargs)
        (x,) = self.named(args, kwargs).values()
        return self.step(x)


class GatedMlp(_Mlp):
    """``down(act(gate(x)) * up(x))`` with gate and up as one linear."""

    def activations(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return self.ops.gated

    def bind(self) -> None:
        self.linears = [getattr(self.module, name) for name in self.spec.gate_up]
        merged = merge_linears(self.linears)
        if merged is None:
            raise ValueError(f"{' and '.join(self.spec.gate_up)} {why_not_merged(self.linears)}")
        self.merged = [merged] if len(self.linears) > 1 else []
        self.down = Joined(getattr(self.module, self.spec.down), (), self.ops)
        name = GATED.get(self.activation)
        after: Callable[[Tensor], Rows] = self.ops.gated[self.activation]
        if self.down.takes is not None and not is_dense(merged):
            after = rows_after(self.ops.gated[self.activation], name, self.down.takes, self.ops)
            name = None
        self.into = Joined(merged, self.linears, self.ops, after, name)

    def merged_names(self) -> Sequence[str]:
        return self.spec.gate_up

    def unbind(self) -> None:
        unmerge_linears(self.linears)


class UngatedMlp(_Mlp):
    """``down(act(up(x)))``."""

    def activations(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return self.ops.activations

    def bind(self) -> None:
        (up,) = self.spec.gate_up
        after, name = self.ops.activations[self.activation], ACTIVATIONS.get(self.activation)
        self.into = Joined(getattr(self.module, up), (), self.ops, after, name)
        self.down = Joined(getattr(self.module, self.spec.down), (), self.ops)


MLPS: dict[str, type[Piece]] = {"gated": GatedMlp, "ungated": UngatedMlp}  # of a spec's mlp_kind
