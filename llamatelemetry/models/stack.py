"""A stack of decoder layers: where it stands in a model, under which names it has its parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llamatelemetry.models.families import FAMILIES, Family
from llamatelemetry.models.spec import LayerSpec

Angles = tuple[Tensor, Tensor]  # cos and sin, as a rotary module gives them


@dataclass(frozen=True)
class Stack:
    """The module of a transformers model that runs its decoder layers.

    Attributes:
        path: of the module in the model; "" for the model itself.
    """

    family: Family
    path: str
    module: Any

    @property
    def spec(self) -> LayerSpec:
        return self.family.spec

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def layers(self) -> Any:
        return getattr(self.module, self.family.parts.layers)

    @property
    def norm(self) -> Any:
        """The one after the last layer; None where there is none."""
        return getattr(self.module, self.family.parts.norm)

    @property
    def embedding(self) -> Any:
        return getattr(self.module, self.family.parts.embedding)

    @property
    def positions(self) -> Any:
        """The embedding of positions, or None."""
        name = self.family.parts.positions
        return getattr(self.module, name) if name else None

    @property
    def rotary(self) -> Any:
        """The module of the rotary embedding, or None."""
        name = self.family.parts.rotary
        return getattr(self.module, name) if name and self.spec.rope != "none" else None

    def named(self, *names: str) -> str:
        """A part's name in the model."""
        return ".".join(name for name in (self.path, *names) if name)

    def layer_name(self, i: int, *names: str) -> str:
        return self.named(self.family.parts.layers, str(i), *names)

    def layer_of(self, name: str) -> int:
        """The number of the layer that a part of the model is in; 0 outside all."""
        inside, found, rest = name.partition(self.named(self.family.parts.layers) + ".")
        return int(rest.split(".")[0]) if found and not inside else 0

    def like(self) -> Tensor:
        """A parameter whose dtype and device are those of the hidden states."""
        weight = getattr(self.norm, "weight", None)
        if weight is None:
            weight = next(p for p in self.module.parameters() if p.is_floating_point())
        return weight

    def rope_kinds(self) -> list[str | None]:
        """Names of the rotary embeddings that the layers use: [None] for one that has no name."""
        if self.rotary is None:
            return []
        if not _takes_kind(self.rotary):
            return [None]
        return sorted(set(self.config.layer_types))

    def rope_kind(self, i: int) -> str | None:
        """That of layer i."""
        return self.config.layer_types[i] if _takes_kind(self.rotary) else None

    def angles(self, i: int) -> Callable[[Tensor, Tensor], Angles | None]:
        """What gives layer i its position_embeddings, of hidden states and position ids."""
        if self.rotary is None:
            return lambda x, positions: None
        kind = self.rope_kind(i)
        return lambda x, positions: self.turned(x, positions, kind)

    def turned(self, x: Tensor, positions: Tensor, kind: str | None) -> Angles:
        """What the rotary module of a kind gives for position ids [batch, seqlen]."""
        rotary = self.rotary
        if hasattr(rotary, "mrope_section"):  # positions in time, height and width: text's are one
            positions = positions.expand(3, *positions.shape)
        angles: Angles = rotary(x, positions) if kind is None else rotary(x, positions, kind)
        return angles

    def is_row(self, model: Any) -> bool:
        """Whether a model is of the very class that the stack's row is of."""
        kind = type(model)
        row = FAMILIES.get(kind.__name__)
        return row is self.family and kind.__module__.startswith("transformers.")

    def is_bare_in(self, model: Any) -> bool:
        """Whether a model is the stack and a head around it, not a larger one with more inputs."""
        return self.path == self.family.parts.stack and model.config is self.config

    def is_known_in(self, model: Any) -> bool:
        """Whether the tests prove what a model does around the stack, so that no probe need."""
        return self.is_base() and self.is_row(model) and self.is_bare_in(model)

    def is_base(self) -> bool:
        """Whether the stack is of the very class that its row's base model is."""
        kind = type(self.module)
        names = {row.base_of(name) for name, row in FAMILIES.items() if row is self.family}
        return kind.__name__ in names and kind.__module__.startswith("transformers.")


def _takes_kind(rotary: Any) -> bool:
    forward = getattr(rotary, "forward", rotary)
    return forward is not None and "layer_type" in inspect.signature(forward).parameters


def stack_of(model: Any) -> Stack:
    """The decoder layers of a transformers model, or of whatever stands around one.

    Raises:
        ValueError: no module inside is of a class, or a subclass of one, that a row is of.
    """
    bases = {row.base_of(name): row for name, row in FAMILIES.items()}
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            for kind in type(module).__mro__:
                if kind.__name__ in bases and kind.__module__.startswith("transformers."):
                    return Stack(bases[kind.__name__], path, module)
    raise ValueError(
        "patch: model must have decoder layers of a class in models/families.py, or built alike, "
        f"got {type(model).__name__}; enable_flash_attention chooses our attention alone"
    )
