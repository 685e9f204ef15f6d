"""Our caches behind transformers' Cache, whose tensors are [batch, heads, seqlen, head_dim]."""

from __future__ import annotations

import inspect
import itertools
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from llamatelemetry.inference.kv_cache import KVCache, PagedKVCache

# Whether crop is told how many tokens stay, as in older releases, or how many go.
_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def kept_after_crop(length: int, tokens_to_remove: Any) -> int:
    """How many of length tokens stay: -tokens_to_remove go; of a positive number, as transformers
    had it before, so many stay. What 0 means, the release says."""
    number = int(tokens_to_remove)  # generate gives a tensor
    stay = number > 0 or (number == 0 and _CROPS_TO_LENGTH)
    return min(number, length) if stay else max(length + number, 0)


class _Layer(CacheLayerMixin):
    """What both kinds share: they are allocated from the start, and no mask is offset."""

    is_sliding = False
    is_croppable = True

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass  # there is nothing to do for a cache that was preallocated

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self) -> int:
        """What older releases call get_max_length."""
        return int(self.get_max_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Takes tokens away as DynamicLayer does: kept_after_crop."""
        kept = kept_after_crop(self.get_seq_length(), tokens_to_remove)
        if kept < self.get_seq_length():
            self._truncate(kept)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes so many, next to each other."""
        if batch := self._batch():
            self._select(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        if batch := self._batch():
            self._select(torch.arange(batch)[torch.as_tensor(indices).cpu()])

    @abstractmethod
    def _truncate(self, length: int) -> None: ...

    @abstractmethod
    def _batch(self) -> int:
        """Of how many rows this layer has to select; 0 while it is empty."""

    @abstractmethod
    def _select(self, rows: Tensor) -> None:
        """The batch becomes these of its rows."""


class ContiguousLayer(_Layer):
    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__(index)
        self.cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        k, v = self.cache.update(
            self.index, key_states.transpose(1, 2), value_states.transpose(1, 2)
        )
        return k.transpose(1, 2), v.transpose(1, 2)

    def get_seq_length(self) -> int:
        return self.cache.length(self.index)

    def get_max_length(self) -> int:
        return self.cache.config.max_seq_length

    def reset(self) -> None:
        if self.index == 0:  # for all layers at once
            self.cache.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.reorder(self.index, beam_idx)

    def _truncate(self, length: int) -> None:
        self.cache.truncate(self.index, length)

    def _batch(self) -> int:
        cached = self.cache.get(self.index)
        return 0 if cached is None else len(cached[0])

    def _select(self, rows: Tensor) -> None:
        self.cache.reorder(self.index, rows)


class _PagedLayer(_Layer):
    """Rows of one length; the first layer gives each sequence its new tokens."""

    def __init__(self, cache: PagedKVCache, rows: list[Hashable], index: int) -> None:
        super().__init__(index)
        self.cache, self.rows = cache, rows
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch, _, seqlen, _ = key_states.shape
        if batch != len(self.rows):
            raise ValueError(
                f"PagedKVCache: the batch must have a row for each of {len(self.rows)} sequences, "
                f"got {batch}"
            )
        begin = self.length
        self.length += seqlen
        for row in self.rows:
            if self.cache.length(row) < self.length:
                self.cache.append(row, seqlen)
        slots = torch.stack([self.cache.slot_mapping(row) for row in self.rows])
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        pages = self.cache.update(self.index, k, v, slots[:, begin:].flatten().contiguous())
        # The cache may be of 16 bits beside float32.
        k, v = (x.flatten(0, 1)[slots].transpose(1, 2).to(key_states.dtype) for x in pages)
        return k, v

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.cache.config.max_seq_length

    def reset(self) -> None:
        """Starts the rows anew; the first layer frees their blocks."""
        self.length = 0
        if self.index == 0:
            for row in self.rows:
                self.cache.free(row)
                self.cache.allocate(row)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes a fork of row beam_idx[b] and keeps its name, for all layers at once."""
        if self._batch():
            self._fork(beam_idx.tolist(), list(self.rows))

    def _truncate(self, length: int) -> None:
        self.length = length
        if self.index == 0:
            for row in self.rows:
                self.cache.truncate(row, length)

    def _batch(self) -> int:
        return len(self.rows) if self.index == 0 and self.length else 0

    def _select(self, rows: Tensor) -> None:
        """For all layers at once. A row keeps its name; its second copy is (name, 1)."""
        names: list[Hashable] = []
        others = set(self.cache.blocks.sequences()) - set(self.rows)
        for name in (self.rows[row] for row in rows.tolist()):
            copies = itertools.chain([name], ((name, i) for i in itertools.count(1)))
            names.append(next(x for x in copies if x not in names and x not in others))
        self._fork(rows.tolist(), names)

    def _fork(self, sources: list[int], names: list[Hashable]) -> None:
        """Row b becomes a fork of row sources[b] under names[b]."""
        self.cache.check_batch("fork", len(names) - len(self.rows))
        blocks = self.cache.blocks  # for a moment there are more sequences than a batch has
        olds = [object() for _ in self.rows]
        for old, row in zip(olds, self.rows, strict=True):
            blocks.fork(row, old)
            blocks.free(row)
        for name, source in zip(names, sources, strict=True):
            blocks.fork(olds[source], name)
        for old in olds:
            blocks.free(old)
        self.rows[:] = names


def contiguous_cache(cache: KVCache) -> Cache:
    """A Cache whose layers are those of a KVCache."""
    return Cache(layers=[ContiguousLayer(cache, i) for i in range(cache.config.num_layers)])


def paged_cache(cache: PagedKVCache, sequences: Sequence[Hashable]) -> Cache:
    """A Cache over new sequences of a PagedKVCache; free them when it is done with.

    Raises:
        RuntimeError, ValueError: as allocate; none of the sequences is allocated then.
    """
    rows: list[Hashable] = []
    try:
        for row in sequences:
            cache.allocate(row)
            rows.append(row)
    except (RuntimeError, ValueError, TypeError):
        for row in rows:
            cache.free(row)
        raise
    return Cache(layers=[_PagedLayer(cache, rows, i) for i in range(cache.config.num_layers)])
