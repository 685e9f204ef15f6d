"""One new token a row over transformers' dynamic cache, as the packed forward runs it.

A DynamicLayer makes new tensors of all its keys and values for each token. Here they are the front
of memory with slots to spare, which rope_append_kv_ fills and paged_attention reads as a page a
row: a layer is eight launches, ten where a norm follows attention, and what they share is made once
a forward. To whoever reads the cache its layers hold what they would hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from llamatelemetry.models.hf_fallback import wants_weights
from llamatelemetry.models.hf_masks import KeyMask
from llamatelemetry.models.hf_overrides import OVERRIDES
from llamatelemetry.models.pieces.angles import rows_of_angles
from llamatelemetry.models.pieces.arguments import CACHE_NAMES
from llamatelemetry.models.pieces.watch import EVERYWHERE, has_hooks
from llamatelemetry.models.step_input import StepInput

SPARE_SLOTS = 128  # of a row, each time that a layer is copied
_ROOM = "_llamatelemetry_room"  # attribute of a DynamicLayer: a Room
_READ = frozenset({"hidden_states", "attention_mask", "position_embeddings", *CACHE_NAMES})
_UNREAD = frozenset({"position_ids", "use_cache"})
_UPDATES = (Cache.update, DynamicCache.update, DynamicLayer.update)


class Room:
    """Memory with slots to spare, and what of it a DynamicLayer has been given.

    Attributes:
        k, v: [batch, num_heads_kv, capacity, head_dim], the heads of a slot side by side
        pages: the same as our ops take them, [batch, capacity, num_heads_kv, head_dim]
        keys, values: what the layer holds while nobody has changed it: the first slots of k and v.
            So whoever still holds fewer of them, as a copy of the layer, is not written over
    """

    __slots__ = ("capacity", "k", "keys", "pages", "v", "values")

    def __init__(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        pages = []
        for x in (keys, values):
            batch, heads, filled, width = x.shape
            page = x.new_empty(batch, capacity, heads, width)
            page.narrow(1, 0, filled).copy_(x.transpose(1, 2))
            pages.append(page)
        self.pages = (pages[0], pages[1])
        self.k, self.v = (page.transpose(1, 2) for page in pages)
        self.keys, self.values, self.capacity = keys, values, capacity

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the cache makes its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class DynamicStep:
    """What the layers of one forward share: one token a row, none of them padding.

    Attributes:
        length: keys of a row, the token's own included.
    """

    def __init__(self, mask: KeyMask, layers: list[Any], like: Tensor) -> None:
        batch = like.shape[0]
        self.layers, self.batch, self.length = layers, batch, mask.key_rules[0] + 1
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=like.device)
        self.lengths = torch.full((batch,), self.length, dtype=torch.int32, device=like.device)
        self._inputs: dict[int, StepInput] = {}
        self._angles: tuple[Any, Any] = (None, None)

    def input(self, capacity: int) -> StepInput:
        """The step over rooms of so many slots a row."""
        if (step := self._inputs.get(capacity)) is None:
            first, device = self.length - 1, self.starts.device
            slots = torch.arange(first, first + self.batch * capacity, capacity, device=device)
            step = StepInput(
                positions=None,  # type: ignore[arg-type]  # row i of the angles is token i's
                slot_mapping=slots,
                block_table=self.starts[:-1].unsqueeze(1),
                cache_seqlens=self.lengths,
                cu_seqlens_q=self.starts,
                max_seqlen_q=1,
                is_whole=False,
            )
            self._inputs[capacity] = step
        return step

    def rope(self, angles: Any, attention: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """cos and sin, a row a token; made once for all layers that are given the same."""
        if angles is None:
            return None
        if self._angles[0] is not angles:
            self._angles = (angles, rows_of_angles(attention.spec, angles, self.batch, dtype))
        rope: tuple[Tensor, Tensor] = self._angles[1]
        return rope

    def room(self, index: int, x: Tensor) -> Room | None:
        """Where a layer's keys and values go; None where they are not as a room has them."""
        layer, length = self.layers[index], self.length
        room: Room | None = getattr(layer, _ROOM, None)
        keys, values = layer.keys, layer.values
        if (
            room is None
            or keys is not room.keys
            or values is not room.values
            or room.capacity < length
            or room.k.is_inference() > torch.is_inference_mode_enabled()
        ):
            if not _is_alike(keys, values, x, length - 1):
                return None
            room = layer._llamatelemetry_room = Room(keys, values, length + SPARE_SLOTS)
        elif keys.shape[2] != length - 1 or keys.dtype is not x.dtype:
            return None
        layer.keys = room.keys = room.k.narrow(2, 0, length)
        layer.values = room.values = room.v.narrow(2, 0, length)
        return room


def _is_alike(keys: Any, values: Any, x: Tensor, filled: int) -> bool:
    """Whether a layer's keys and values can be moved to a room, and tokens like x follow them."""
    return (
        isinstance(keys, Tensor)
        and isinstance(values, Tensor)
        and keys.ndim == values.ndim == 4
        and keys.shape[:3] == values.shape[:3]
        and keys.shape[::2][:2] == (x.shape[0], filled)
        and keys.dtype == values.dtype == x.dtype
        and keys.device == values.device == x.device
    )


def dynamic_step(call: Mapping[str, Any]) -> DynamicStep | None:
    """What a layer's call shares with those of the other layers, where it is of this kind."""
    if torch.compiler.is_compiling():
        return None
    mask = call.get("attention_mask")
    if type(mask) is not KeyMask:
        return None
    cache = call.get("past_key_values") or call.get("cache")
    if mask.step is None or mask.step[0] is not cache:
        mask.step = (cache, _made(mask, cache, call["hidden_states"]))
    step: DynamicStep | None = mask.step[1]
    return step


def _made(mask: KeyMask, cache: Any, x: Tensor) -> DynamicStep | None:
    batch, _, seqlen_q, seqlen_k = mask.shape
    start, causal, left, right = mask.key_rules
    if (
        type(cache) is not DynamicCache
        or getattr(cache, "offloading", True)
        or (Cache.update, DynamicCache.update, DynamicLayer.update) != _UPDATES
        or any(type(layer) is not DynamicLayer for layer in cache.layers)
        or wants_weights({})
        or mask.key_tokens is not None
        or mask.key_start is not None
        or mask.is_floating_point()
        or (causal, left, right) != (True, -1, -1)
        or seqlen_q != 1
        or seqlen_k != start + 1
        or x.shape[:2] != (batch, 1)
    ):
        return None
    return DynamicStep(mask, cache.layers, x)


def sees_all(attention: Any) -> bool:
    """Whether every query of an attention sees all keys before it, by its module and by whoever
    has changed that."""
    return attention.window is None and OVERRIDES not in vars(attention.module)


def asks_for_more(call: Mapping[str, Any]) -> bool:
    """Whether a layer's call has arguments besides those that are read here."""
    return any(
        value is not None and value is not False and name not in _UNREAD
        for name, value in call.items()
        if name not in _READ
    )


def unheard(module: nn.Module, kind: Any, x: Tensor) -> Any:
    """The piece of this kind that stands for a module which nobody hears being called; else None.

    Args:
        x: the hidden states.
    """
    piece = getattr(vars(module).get("forward"), "__self__", None)
    if (
        not isinstance(piece, kind)
        or module.training
        or piece.dtype is not x.dtype
        or has_hooks(module._forward_hooks, module._forward_pre_hooks, *EVERYWHERE)
        or piece.changed() is not None
    ):
        return None
    return piece
