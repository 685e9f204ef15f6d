"""A decoder layer: the one place that says in which order its parts and norms come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.pieces.arguments import KNOWN_TO_LAYERS, without_encoder
from llamatelemetry.models.pieces.attention import Attention
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.dynamic import asks_for_more, dynamic_step, sees_all, unheard
from llamatelemetry.models.pieces.linear import Rows
from llamatelemetry.models.pieces.mlp import GatedMlp, UngatedMlp
from llamatelemetry.models.pieces.norm import EPS_NAMES, Norm, NormFunction
from llamatelemetry.models.pieces.watch import EVERYWHERE
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
        # Whether nothing comes between the residual and what attention and MLP give.
        self.adds_alone = (
            self.attention_norm is None
            and self.mlp_norm is None
            and self.multiplier == 1.0
            and not self.is_parallel
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
        if (decoded := self._decoded(call)) is not None:
            return decoded
        hidden_states = call.pop("hidden_states")
        attention = getattr(self.module, self.spec.attention)
        residual = hidden_states.clone()  # the caller may keep its tensor
        first_norm = self.spec.first_norm
        x = getattr(self.module, first_norm)(hidden_states) if first_norm else hidden_states
        # The modules are called, not their pieces, so that hooks on them are.
        x = self.run(x, residual, lambda x: _attended(attention, x, call), self.mlp)
        return residual.add_(x)

    def _decoded(self, call: dict[str, Any]) -> Tensor | None:
        """The layer's output for one token a row over a dynamic cache; None for other calls."""
        step = dynamic_step(call)
        if step is None or self.ops is not NATIVE or asks_for_more(call):
            return None
        spec, module, x = self.spec, self.module, call["hidden_states"]
        attention = unheard(getattr(module, spec.attention), Attention, x)
        mlp = unheard(getattr(module, spec.mlp), (GatedMlp, UngatedMlp), x) if spec.mlp else None
        norm = unheard(getattr(module, spec.first_norm), Norm, x) if spec.first_norm else None
        if attention is None or mlp is None or (norm is None and spec.first_norm):
            return None
        rope = step.rope(call.get("position_embeddings"), attention, x.dtype)
        if (rope is None and attention.turns) or not sees_all(attention):
            return None
        room = step.room(attention.module.layer_idx, x)
        if room is None:
            return None
        h = x.view(step.batch, -1)
        x = h if norm is None else norm.function(h)
        where = (step.input(room.capacity), rope, room.pages)
        if self.adds_alone:
            h = attention.o.added(attention.before_output(x, *where), h)
            x = h if self.middle_norm is None else self.middle_norm(h)
            return mlp.down.added(mlp.into(x), h).unsqueeze(1)
        h = h.clone()  # the caller may keep its tensor
        x = self.run(x, h, lambda x: attention.step(x, *where), mlp.step)
        return h.add_(x).unsqueeze(1)


def _attended(attention: nn.Module, x: Tensor, call: dict[str, Any]) -> Tensor:
    """What the attention's module gives, in memory of its own: the norm after it writes there."""
    attended = attention(hidden_states=x, **call)[0]
    # A hook may keep its tensor, or have put its own in that one's place.
    is_heard = bool(EVERYWHERE[0]) or any(
        part._forward_hooks for part in (attention, *attention.children())
    )
    return attended.clone() if is_heard else attended


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
