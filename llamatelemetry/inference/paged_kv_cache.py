"""A key-value cache in pages for sequences of any lengths."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.arguments import at_least, instance, integer
from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.kv_cache_config import (
    EIGHT_BIT,
    SIXTEEN_BIT,
    KVCacheConfig,
    ServesTransformers,
)
from llamatelemetry.inference.kv_pages import KvPages
from llamatelemetry.ops import append_kv_, slot_mapping


class PagedKVCache(ServesTransformers):
    """Keys and values of sequences of any lengths in pages, shared where they begin alike.

    BlockManager says which blocks a sequence has, KvPages holds the tensors. Either a config, whose
    max_batch_size and max_seq_length are limits, or sizes by keyword, of which those named are.
    block_size is another name of page_size. A dtype of float8_e4m3fn or int8 takes half the memory
    of 16 bits: each token and head has a scale.

    Attributes:
        blocks: BlockManager.
        pages: KvPages; pages.layers are what paged_attention takes.

    Raises:
        TypeError: for a keyword that is none of KVCacheConfig's.
        ValueError: for a size below 1, a page_size and a block_size that differ, and a dtype that
            paged_attention does not take.

    Example:
        >>> cache = PagedKVCache(num_blocks=8, block_size=4, num_layers=1, num_heads=2, head_dim=8)
        >>> cache.allocate("first", range(10))
        0
        >>> cache.commit("first")  # once the keys and values are written
        >>> cache.allocate("second", range(12))  # begins with two full blocks of the first
        8
    """

    def __init__(
        self,
        config: KVCacheConfig | None = None,
        page_size: int = 16,
        *,
        num_blocks: int | None = None,
        block_size: int | None = None,
        **sizes: Any,
    ) -> None:
        if config is not None:
            instance("PagedKVCache: config", config, KVCacheConfig, "a KVCacheConfig")
        if config is not None and sizes:
            raise ValueError(
                f"PagedKVCache: sizes must come from config or keywords, got both: {sorted(sizes)}"
            )
        limits = ("max_batch_size", "max_seq_length")
        self._limits = [name for name in limits if config is not None or name in sizes]
        self.config = config = _config_of(sizes) if config is None else config
        _check_dtype(config.dtype)
        size = _page_size_of(page_size, block_size)
        if num_blocks is None:
            num_blocks = config.max_batch_size * -(-config.max_seq_length // size)
        self.blocks = BlockManager(at_least("PagedKVCache: num_blocks", num_blocks, 1), size)
        device = torch.get_default_device() if config.device is None else config.device
        self.pages = KvPages(
            config.num_layers,
            num_blocks,
            size,
            config.kv_heads,
            config.head_dim,
            config.dtype,
            device,
        )

    def allocate(self, sequence: Hashable, tokens: Iterable[int] | int = 0) -> int:
        """Gives a new sequence blocks for its tokens; a number stands for that many of which
        nothing is known, so that they are never shared.

        Returns:
            How many leading tokens are in the cache already: update needs not be given them.

        Raises:
            OutOfBlocks: a RuntimeError "Out of KV cache memory: ..." with the numbers.
            RuntimeError: for more than max_batch_size sequences or max_seq_length tokens.
            ValueError: for a count or an id that is no whole number of at least 0.
        """
        named = _named("allocate", tokens)
        if sequence not in self.blocks.sequences():
            self.check_batch("allocate", 1)
        self._check_length("allocate", sequence, 0, len(named))
        return self.blocks.allocate(sequence, named)

    def append(self, sequence: Hashable, tokens: Iterable[int] | int = 1) -> None:
        """Gives a sequence more tokens; its last block is copied first where others share it.

        Raises:
            OutOfBlocks, RuntimeError, ValueError: as allocate.
        """
        named = _named("append", tokens)
        self._check_length("append", sequence, self.length(sequence), len(named))
        self.pages.copy_blocks(self.blocks.append(sequence, named))

    def fork(self, sequence: Hashable, child: Hashable) -> None:
        """A second sequence that begins as the first is now; it counts for max_batch_size."""
        if child not in self.blocks.sequences():
            self.check_batch("fork", 1)
        self.blocks.fork(sequence, child)

    def truncate(self, sequence: Hashable, num_tokens: int) -> None:
        """Takes a sequence's last tokens away, so that num_tokens stay; committed ones must."""
        self.blocks.truncate(sequence, integer("PagedKVCache.truncate: num_tokens", num_tokens))

    def free(self, sequence: Hashable) -> None:
        """Ends a sequence; its full blocks stay cached until they are needed."""
        self.blocks.free(sequence)

    def commit(self, sequence: Hashable) -> None:
        """Says that every layer's keys and values of all tokens are written, so that later
        sequences may share them."""
        self.blocks.commit(sequence, self.length(sequence))

    def check(self) -> None:
        """Walks every invariant; raises RuntimeError that names those that do not hold."""
        self.blocks.check()

    def clear(self) -> None:
        """Ends every sequence and forgets what is cached."""
        for sequence in self.blocks.sequences():
            self.blocks.free(sequence)
        self.blocks.forget_prefixes()

    def length(self, sequence: Hashable) -> int:
        return len(self.blocks.tokens(sequence))

    def block_table(self, sequences: Sequence[Hashable]) -> Tensor:
        """[batch, max_blocks] int32 on the cache's device, padded with -1."""
        tables = [self.blocks.table(sequence) for sequence in sequences]
        width = max(map(len, tables), default=0)
        rows = [[*table, *[-1] * (width - len(table))] for table in tables]
        table = torch.tensor(rows, dtype=torch.int32).view(len(rows), width)
        return table.to(self.pages.device)

    def slot_mapping(self, sequence: Hashable, begin: int = 0) -> Tensor:
        """Slots of the sequence's tokens from begin on, [num_tokens] int64."""
        device, length = self.pages.device, self.length(sequence)
        if not 0 <= integer("PagedKVCache.slot_mapping: begin", begin) <= length:
            raise ValueError(
                f"PagedKVCache.slot_mapping: begin must lie in [0, {length}], got {begin}"
            )
        positions = torch.arange(begin, length, device=device)
        starts = torch.tensor([0, len(positions)], dtype=torch.int32).to(device)
        return slot_mapping(positions, self.block_table([sequence]), starts, self.pages.page_size)

    def update(self, layer_idx: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        """Writes keys and values [num_tokens, num_kv_heads, head_dim] of a layer to their slots.

        Returns:
            The layer's pages, (k, v), as paged_attention takes them; of 8 bits (k, v, k_scales,
            v_scales).
        """
        k_pages, v_pages, *scales = pages = self._layer("update", layer_idx)
        append_kv_(k, v, k_pages, v_pages, slots, *scales)
        return pages

    def get(self, layer_idx: int, sequence: Hashable) -> tuple[Tensor, Tensor] | None:
        """Copies of a sequence's keys and values in order, [length, num_kv_heads, head_dim]; None
        for a sequence without tokens. Of 8 bits they are multiplied out, in float32."""
        slots = self.slot_mapping(sequence)
        if not len(slots):
            return None
        k, v, *scales = (pages.flatten(0, 1)[slots] for pages in self._layer("get", layer_idx))
        if scales:
            k, v = (x.float() * s.unsqueeze(-1) for x, s in zip((k, v), scales, strict=True))
        return k, v

    def for_transformers(self, sequences: Sequence[Hashable]) -> Any:
        """A transformers Cache over new sequences of these names, one a row of the batch.

        Raises:
            ValueError: for a cache of 8 bits, which transformers would multiply as it is.
        """
        if self.config.dtype in EIGHT_BIT:
            raise ValueError(
                "PagedKVCache.for_transformers: dtype must be the model's, got "
                f"{self.config.dtype}; ContinuousBatching(cache_dtype=...) runs models over it"
            )
        from llamatelemetry.inference.hf_cache import paged_cache

        return paged_cache(self, sequences)

    def check_batch(self, method: str, more: int) -> None:
        """Raises RuntimeError where so many more sequences exceed max_batch_size."""
        count, limit = self.blocks.num_sequences, self.config.max_batch_size
        if "max_batch_size" in self._limits and count + more > limit:
            raise RuntimeError(
                f"PagedKVCache.{method}: sequences must be at most max_batch_size = {limit}, got "
                f"{count} + {more}; free one or use a larger cache"
            )

    def _layer(self, method: str, layer_idx: int) -> tuple[Tensor, ...]:
        """The pages of a layer."""
        name, count = f"PagedKVCache.{method}: layer_idx", self.config.num_layers
        if not 0 <= integer(name, layer_idx) < count:
            raise ValueError(f"{name} must lie in [0, {count}), got {layer_idx}")
        return self.pages.layers[layer_idx]

    def _check_length(self, method: str, sequence: Hashable, begin: int, more: int) -> None:
        limit = self.config.max_seq_length
        if "max_seq_length" in self._limits and begin + more > limit:
            raise RuntimeError(
                f"PagedKVCache.{method}: a sequence must fit max_seq_length = {limit}, got {begin} "
                f"+ {more} tokens for {sequence!r}"
            )


def _config_of(sizes: dict[str, Any]) -> KVCacheConfig:
    names = [field.name for field in fields(KVCacheConfig)]
    if unknown := sorted(set(sizes) - set(names)):
        raise TypeError(
            f"PagedKVCache: sizes must be among page_size, block_size, num_blocks, "
            f"{', '.join(names)}, got {', '.join(unknown)}"
        )
    return KVCacheConfig(**sizes)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, *SIXTEEN_BIT, *EIGHT_BIT):
        raise ValueError(
            "PagedKVCache: dtype must be float32, float16, bfloat16, float8_e4m3fn or int8, got "
            f"{dtype}"
        )


def _page_size_of(page_size: int, block_size: int | None) -> int:
    if block_size is None:
        return at_least("PagedKVCache: page_size", page_size, 1)
    if page_size not in (16, block_size):  # 16 is its default
        raise ValueError(
            f"PagedKVCache: block_size must be page_size, {page_size}, or left out, got "
            f"{block_size}"
        )
    return at_least("PagedKVCache: block_size", block_size, 1)


def _named(method: str, tokens: Iterable[int] | int) -> list[Any]:
    """The ids of tokens; an object of its own for each of which only the count is given."""
    try:
        given = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        ids = list(given)  # type: ignore[arg-type]
    except TypeError:
        count = integer(f"PagedKVCache.{method}: tokens, or their number,", tokens)
        if count < 0:
            raise ValueError(
                f"PagedKVCache.{method}: the number of tokens must be at least 0, got {count}"
            ) from None
        return [object() for _ in range(count)]
    ids = [integer(f"PagedKVCache.{method}: a token", one) for one in ids]
    if negative := [one for one in ids if one < 0]:
        raise ValueError(f"PagedKVCache.{method}: a token must be at least 0, got {negative[0]}")
    return ids
