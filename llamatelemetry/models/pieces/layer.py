"""A decoder layer: the one place that says in which order its parts and norms come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.pieces.base import KNOWN_TO_LAYERS, Piece
from llamatelemetry.models.pieces.norm import eps_of
from llamatelemetry.models.spec import LayerSpec

# What this package's pieces can do of what a LayerSpec can say. A field that is not named here is a
# name, which they look up whatever it is.
_SERVED: dict[str, tuple[Any, ...]] = {
    "norm": ("rms",),
    "parallel": (False,),
    "conv1d": (False,),
    "rope_kind": ("",),
    "sinks": ("",),
    "mlp_kind": ("gated", "own"),
    "final_softcap": ("",),
}


def unserved(spec: LayerSpec) -> str | None:
    """What a spec asks for that no piece does yet; None where all of it is served."""
    for name, served in _SERVED.items():
        value = getattr(spec, name)
        if value not in served:
            return f"LayerSpec.{name} must be one of {served}, got {value!r}"
    return None


class DecoderLayer(Piece):
    """Attention and MLP, each added to the residual; a sum and the norm after it are one op."""

    known = KNOWN_TO_LAYERS

    def __init__(
        self, module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet = NATIVE
    ) -> None:
        super().__init__(module, spec, config, ops)
        self.first_norm = norm_of(module, spec.first_norm)
        self.attention_norm = norm_of(module, spec.attention_norm)
        self.middle_norm = norm_of(module, spec.middle_norm)
        self.mlp_norm = norm_of(module, spec.mlp_norm)
        self.multiplier = number_of(module, spec.residual_multiplier)

    def bypassed(self) -> list[tuple[str, nn.Module]]:
        names = (self.spec.attention_norm, self.spec.middle_norm, self.spec.mlp_norm)
        return [(name, norm_of(self.module, name)) for name in names if name]

    def run(
        self,
        x: Tensor,
        residual: Tensor,
        attend: Callable[[Tensor], Tensor],
        mlp: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The layer, up to what its end adds to residual, which is written in place.

        Args:
            x: the layer's input after its first norm.
            residual: the layer's input; afterwards with the attention's part.
            attend: the attention, of x.
            mlp: the MLP.
        """
        x = self._scaled(self._normed(attend(x), self.attention_norm))
        x = add_norm(self.ops, x, residual, self.middle_norm)
        return self._scaled(self._normed(mlp(x), self.mlp_norm))

    def _normed(self, x: Tensor, norm: Any) -> Tensor:
        return x if norm is None else self.ops.rms_norm(x, norm.weight, eps_of(norm))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1.0 else x * self.multiplier

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() or self.changed():
            return self.original(*args, **kwargs)
        call = self.named(args, kwargs)
        hidden_states = call.pop("hidden_states")
        attention = getattr(self.module, self.spec.attention)
        residual = hidden_states.clone()  # the caller may keep its tensor
        x = hidden_states if self.first_norm is None else self.first_norm(hidden_states)
        # The modules are called, not their pieces, so that hooks on them are.
        x = self.run(
            x,
            residual,
            lambda x: attention(hidden_states=x, **call)[0],
            getattr(self.module, self.spec.mlp),
        )
        return residual.add_(x)


def add_norm(ops: OpSet, x: Tensor, residual: Tensor, norm: Any) -> Tensor:
    """``residual += x``, and norm of it in place of x; the sum itself where there is no norm."""
    if norm is None:
        return residual.add_(x)
    ops.fused_add_rms_norm_(x, residual, norm.weight, eps_of(norm))
    return x


def norm_of(layer: nn.Module, name: str) -> Any:
    return getattr(layer, name) if name else None


def number_of(owner: Any, name: str) -> float:
    """A factor that a family has under this name; 1 where it has none."""
    return float(getattr(owner, name)) if name else 1.0
