"""Our caches behind transformers' Cache, whose tensors are [batch, heads, seqlen, head_dim]."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from llamatelemetry.inference.kv_cache import KVCache, PagedKVCache


class _Layer(CacheLayerMixin):
    """What both kinds share: they are allocated from the start, and no mask is offset."""

    is_sliding = False

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass  # there is nothing to do for a cache that was preallocated

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class _ContiguousLayer(_Layer):
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
        k, v = (x.flatten(0, 1)[slots].transpose(1, 2) for x in pages)
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
        """Row b becomes a fork of row beam_idx[b], for all layers at once."""
        if self.index == 0:
            olds = [object() for _ in self.rows]
            for old, row in zip(olds, self.rows, strict=True):
                self.cache.fork(row, old)
                self.cache.free(row)
            for row, source in zip(self.rows, beam_idx.tolist(), strict=True):
                self.cache.fork(olds[source], row)
            for old in olds:
                self.cache.free(old)


def contiguous_cache(cache: KVCache) -> Cache:
    """A Cache whose layers are those of a KVCache."""
    return Cache(layers=[_ContiguousLayer(cache, i) for i in range(cache.config.num_layers)])


def paged_cache(cache: PagedKVCache, sequences: Sequence[Hashable]) -> Cache:
    """A Cache over new sequences of a PagedKVCache; free them when it is done with."""
    rows = list(sequences)
    for row in rows:
        cache.allocate(row)
    return Cache(layers=[_PagedLayer(cache, rows, i) for i in range(cache.config.num_layers)])
