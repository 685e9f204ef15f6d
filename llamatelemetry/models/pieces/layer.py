"""A decoder layer: the one place that says in which order its parts and norms come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.pieces.arguments import KNOWN_TO_LAYERS, without_encoder
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.linear import Rows
from llamatelemetry.models.pieces.norm import EPS_NAMES, NormFunction
from llamatelemetry.models.spec import LayerSpec
from llamatelemetry.quantization.rows import RowFormat


class DecoderLayer(Piece):
    """Attention and MLP, each added to the residual; a sum and the norm after it are one op."""

    known = KNOWN_TO_LAYERS

    def __init__(
        self, module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet = NATIVE
    ) -> None:
        super().__init__(module, spec, config, ops)
        self.first_norm = norm_of(module, spec.first_norm, spec, ops)
        self.attention_norm = norm_of(module, spec.attention_norm, spec, ops)
        self.middle_norm = norm_of(module, spec.middle_norm, spec, ops)
        self.mlp_norm = norm_of(module, spec.mlp_norm, spec, ops)
        self.multiplier = number_of(module, spec.residual_multiplier)
        is_parallel = spec.parallel
        self.is_parallel = bool(
            getattr(config, is_parallel) if isinstance(is_parallel, str) else is_parallel
        )
        if spec.mlp_kind == "plain":
            name = getattr(config, spec.activation)
            self.activation = ops.activations.get(name) or ACT2FN[name]

    def bypassed(self) -> list[tuple[str, nn.Module]]:
        names = (self.spec.attention_norm, self.spec.middle_norm, self.spec.mlp_norm)
        norms = ((name, norm_in(self.module, name)) for name in names)
        return [(name, norm) for name, norm in norms if norm is not None]

    def numbers(self) -> list[tuple[Any, str]]:
        multiplier = self.spec.residual_multiplier
        return [
            *((self.module, name) for name in (multiplier,) if name),
            *((norm, name) for _, norm in self.bypassed() for name in EPS_NAMES),
        ]

    def run(
        self,
        x: Any,
        residual: Tensor,
        attend: Callable[[Any], Tensor],
        mlp: Callable[[Any], Tensor],
        mlp_takes: RowFormat | None = None,
    ) -> Tensor:
        """The layer, up to what its end adds to residual, which is written in place.

        Args:
            x: the layer's input after its first norm, quantised where attend takes it so.
            residual: the layer's input; afterwards with the attention's part, or as it was where
                attention and MLP are parallel.
            attend: the attention, of x.
            mlp: the MLP.
            mlp_takes: how it takes quantised rows, if it does.
        """
        attended = self._scaled(_normed(attend(x), self.attention_norm))
        if self.is_parallel:
            x = x if self.middle_norm is None else self.middle_norm(residual)
            return attended + self._scaled(_normed(mlp(x), self.mlp_norm))
        x = add_norm(attended, residual, self.middle_norm, mlp_takes)
        return self._scaled(_normed(mlp(x), self.mlp_norm))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1.0 else x * self.multiplier

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP's modules as they stand in the layer, hooks included."""
        spec = self.spec
        if spec.mlp_kind == "plain":
            (up,) = spec.gate_up
            return getattr(self.module, spec.down)(self.activation(getattr(self.module, up)(x)))
        out = getattr(self.module, spec.mlp)(x)
        return out[0] if spec.router_scores else out

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.stands_aside(args, kwargs):
            return self.run_original(*args, **kwargs)
        call = self.named(args, kwargs)
        if not without_encoder(call):
            return self.run_original(*args, **kwargs)
        hidden_states = call.pop("hidden_states")
        attention = getattr(self.module, self.spec.attention)
        residual = hidden_states.clone()  # the caller may keep its tensor
        first_norm = self.spec.first_norm
        x = getattr(self.module, first_norm)(hidden_states) if first_norm else hidden_states
        # The modules are called, not their pieces, so that hooks on them are.
        x = self.run(x, residual, lambda x: attention(hidden_states=x, **call)[0], self.mlp)
        return residual.add_(x)


def _normed(x: Tensor, norm: NormFunction | None) -> Tensor:
    return x if norm is None else norm(x)


def add_norm(
    x: Tensor, residual: Tensor, norm: NormFunction | None, takes: RowFormat | None = None
) -> Rows:
    """``residual += x``, and norm of it, maybe in x; the sum itself where there is no norm.

    Args:
        takes: how what comes after takes quantised rows, if it does.
    """
    return residual.add_(x) if norm is None else norm.after_add(x, residual, takes)


def norm_of(owner: nn.Module, name: str, spec: LayerSpec, ops: OpSet) -> NormFunction | None:
    """A norm that a module has under this name; None where it has none."""
    norm = norm_in(owner, name)
    return None if norm is None else NormFunction(norm, spec.norm, ops)


def norm_in(owner: nn.Module, name: str) -> Any:
    """The module of a norm; None where there is none, or one that gives what it takes."""
    norm = getattr(owner, name) if name else None
    return None if isinstance(norm, nn.Identity) else norm


def number_of(owner: Any, name: str) -> float:
    """A factor that a family has under this name; 1 where it has none."""
    return float(getattr(owner, name)) if name else 1.0
