"""transformers' cache with keys and values in a runner's pages, until someone asks for them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from llamatelemetry.inference.hf_cache import kept_after_crop
from llamatelemetry.inference.packed_rows import PackedRows

_log = logging.getLogger("llamatelemetry")


class PackedCache(DynamicCache):
    """A DynamicCache without tensors: PackedForward reads and writes rows.

    Whoever reads its layers, as every method that is not defined here does, and every module that
    updates it, gets layers with all keys and values in tensors of their own; from then on it is an
    ordinary cache.

    Attributes:
        rows: where the keys and values lie; None once the layers hold them.
    """

    rows: PackedRows | None = None

    def __init__(self, layers: list[Any], rows: PackedRows) -> None:
        Cache.__init__(self, layers=layers)
        self.rows = rows

    @property
    def layers(self) -> list[Any]:
        if self.rows is not None:
            _log.info("generate: a cache leaves its pages, as its layers are read")
            self.unpack()
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    def unpack(self, trains: bool = False) -> None:
        """Puts keys and values into the layers, for good.

        Args:
            trains: whether into transformers' own layers, through which gradients flow.
        """
        if self.rows is None:
            return
        with self.rows.shared.turn():
            if (rows := self.rows) is None:  # another thread was here
                return
            if trains:
                self._layers = [
                    layer if isinstance(layer, DynamicLayer) else DynamicLayer()
                    for layer in self._layers
                ]
            for layer, held in zip(self._layers, rows.dense() or [], strict=bool(rows.columns)):
                layer.update(*held)
            self.rows = None
            rows.release()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self.rows is None else self.rows.columns

    def get_max_length(self, *args: Any, **kwargs: Any) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self, *args: Any, **kwargs: Any) -> int:
        """What older releases call get_max_length."""
        return -1

    def crop(self, *args: Any, **kwargs: Any) -> None:
        if self.rows is None:
            super().crop(*args, **kwargs)
            return
        (number,) = (*args, *kwargs.values())
        with self.rows.shared.turn():
            kept = kept_after_crop(self.rows.columns, number)
            if kept < self.rows.columns:
                self.rows.truncate(kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.rows is None:
            super().reorder_cache(beam_idx)
        else:
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is None:
            super().batch_repeat_interleave(repeats)
        else:
            self._select(torch.arange(self.rows.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows is None:
            super().batch_select_indices(indices)
        else:
            self._select(torch.arange(self.rows.batch)[torch.as_tensor(indices).cpu()])

    def _select(self, indices: Tensor) -> None:
        assert self.rows is not None
        with self.rows.shared.turn():
            self.rows.select(indices.tolist())

    def reset(self) -> None:
        if self.rows is None:
            super().reset()
        else:
            with self.rows.shared.turn():
                self.rows.release()

    def activate_past_recording(self) -> None:
        """Pages keep the past in any case; layers are told in case they get it."""
        for layer in self._layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rows={self.rows})" if self.rows else super().__repr__()

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True if self.rows is not None else bool(super().is_croppable)

    @property
    def is_initialized(self) -> bool:
        return super().is_initialized if self.rows is None else self.rows.columns > 0

    @property
    def is_sliding(self) -> list[bool]:
        return [bool(getattr(layer, "is_sliding", False)) for layer in self._layers]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self._layers)

    @property
    def batch_size(self) -> int:
        return super().batch_size if self.rows is None else self.rows.batch

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCache:
        twin = memo[id(self)] = type(self).__new__(type(self))
        state = dict(self.__dict__)
        rows = state.pop("rows", None)
        twin.__dict__.update(copy.deepcopy(state, memo))
        if rows is not None:
            with rows.shared.turn():
                twin.rows = rows.fork()
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.unpack()
        return super().__reduce_ex__(protocol)
