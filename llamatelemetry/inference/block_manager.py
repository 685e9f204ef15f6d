"""Which block of the paged cache holds which tokens of which sequence: bookkeeping without tensors.

A block is in one of three states: free; referenced by the tables of one or more sequences; or idle,
that is, cached under its tokens and referenced by none. Idle blocks are given away when no block is
free, the least recently used first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from llamatelemetry.inference.block_books import Cached, Key, Placed, broken_rules

_NO_PREFIX = 0


class OutOfBlocks(RuntimeError):
    """The paged cache has too few blocks left; nothing was changed."""


class NeverFits(OutOfBlocks, ValueError):
    """A request is for more blocks than the whole cache has: nothing is won by waiting."""


class BlockManager:
    """Gives blocks to sequences, shares the blocks of equal prefixes, and copies before a write.

    Sequences are named by any hashable. Not thread-safe: the caller holds a lock.

    Args:
        num_blocks: blocks of the cache.
        page_size: tokens in a block.
        share_prefixes: whether full blocks are cached and shared; forks share theirs in any case.
    """

    def __init__(self, num_blocks: int, page_size: int, *, share_prefixes: bool = True) -> None:
        for name, value, least in (("num_blocks", num_blocks, 0), ("page_size", page_size, 1)):
            if value < least:
                raise ValueError(f"BlockManager: {name} must be at least {least}, got {value}")
        self.page_size = page_size
        self.share_prefixes = share_prefixes
        self._references: list[int] = []
        self._free: list[int] = []  # the last one is given away first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cached: dict[Key, Cached] = {}
        self._key_of: dict[int, Key] = {}  # of each block in _cached
        self._prefixes = itertools.count(_NO_PREFIX + 1)
        self._sequences: dict[Hashable, Placed] = {}
        self.add_blocks(num_blocks)

    @property
    def num_blocks(self) -> int:
        return len(self._references)

    @property
    def num_available(self) -> int:
        """Blocks that can be given away: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def add_blocks(self, count: int) -> None:
        """Grows the cache by blocks whose numbers follow the present ones."""
        first = self.num_blocks
        self._references += [0] * count
        self._free[:0] = range(first + count - 1, first - 1, -1)

    def allocate(self, sequence: Hashable, tokens: Sequence[int], reserve: int = 0) -> int:
        """Gives a new sequence blocks for its tokens and for ``reserve`` more to come.

        Returns:
            How many leading tokens have their keys and values in the cache already; at least one
            token has not, for a forward must have one to run on.

        Raises:
            OutOfBlocks: with the numbers; nothing was changed.
            ValueError: for a sequence that there is.
        """
        if sequence in self._sequences:
            raise ValueError(f"allocate: sequence must be a new one, got {sequence!r} again")
        shared = self._cached_prefix(tokens)
        count = self.blocks_for(len(tokens) + reserve) - len(shared)
        self._require(count, kept=sum(one.block in self._idle for one in shared))
        for one in shared:
            self._reference(one.block)
        blocks = [one.block for one in shared] + [self._take() for _ in range(count)]
        num_cached = len(shared) * self.page_size
        prefix = shared[-1].prefix if shared else _NO_PREFIX
        self._sequences[sequence] = Placed(list(tokens), blocks, num_cached, prefix)
        return num_cached

    def reserve(self, sequence: Hashable, count: int) -> list[tuple[int, int]]:
        """Makes room for the sequence's next ``count`` tokens, whatever they will be.

        Returns:
            (source, destination) of each block to be copied before anything is written, for
            copy_blocks_: the last block, if it is part full and shared or cached.

        Raises:
            OutOfBlocks: with the numbers; nothing was changed.
        """
        one = self._get(sequence)
        tail, used = divmod(len(one.tokens), self.page_size)
        block = one.blocks[tail] if count > 0 and used else None
        is_shared = block is not None and (self._references[block] > 1 or block in self._key_of)
        missing = max(self.blocks_for(len(one.tokens) + count) - len(one.blocks), 0)
        self._require(missing + is_shared)
        pairs = []
        if is_shared:
            pairs.append((one.blocks[tail], self._take()))
            self._release(one.blocks[tail])
            one.blocks[tail] = pairs[0][1]
        one.blocks += [self._take() for _ in range(missing)]
        return pairs

    def append(self, sequence: Hashable, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Adds tokens to a sequence, with reserve's result and errors."""
        pairs = self.reserve(sequence, len(tokens))
        self._get(sequence).tokens += tokens
        return pairs

    def truncate(self, sequence: Hashable, num_tokens: int) -> None:
        """Takes the last tokens and what is reserved from a sequence; num_tokens stay."""
        one = self._of_count("truncate", sequence, num_tokens)
        del one.tokens[num_tokens:]
        while len(one.blocks) > self.blocks_for(num_tokens):
            self._release(one.blocks.pop())

    def commit(self, sequence: Hashable, num_tokens: int, *, shared: bool = True) -> None:
        """Says that the first num_tokens are written: from now on others may share their full
        blocks, or with shared False never."""
        one = self._of_count("commit", sequence, num_tokens)
        size = self.page_size
        one.prefix = one.prefix if shared else next(self._prefixes)
        if shared and self.share_prefixes:
            for i in range(one.num_committed // size, num_tokens // size):
                tokens = tuple(one.tokens[i * size : (i + 1) * size])
                one.prefix = self._remember(one.blocks[i], (one.prefix, tokens))
        one.num_committed = num_tokens

    def hide(self, sequence: Hashable, num_tokens: int) -> int:
        """Gives back the blocks of a sequence that hold none but its first num_tokens, committed
        ones that no later token looks at, as behind a sliding window. Their numbers stay in its
        table, where nothing is read any more. Returns how many; they become idle as free has it."""
        one = self._get(sequence)
        first, last = one.num_hidden, min(num_tokens, one.num_committed) // self.page_size
        for block in reversed(one.blocks[first:last]):
            self._release(block)
        one.num_hidden = max(first, last)
        return one.num_hidden - first

    def num_hidden(self, sequence: Hashable) -> int:
        """Leading blocks of a table that the sequence has given back."""
        return self._get(sequence).num_hidden

    def fork(self, sequence: Hashable, child: Hashable) -> None:
        """A second sequence with the same tokens in the same blocks, without what is reserved."""
        one = self._get(sequence)
        if child in self._sequences:
            raise ValueError(f"fork: child must be a new sequence, got {child!r} again")
        blocks = one.blocks[: self.blocks_for(len(one.tokens))]
        for block in blocks[one.num_hidden :]:
            self._references[block] += 1
        self._sequences[child] = replace(one, tokens=list(one.tokens), blocks=blocks)

    def free(self, sequence: Hashable) -> None:
        """Ends a sequence. Its cached blocks may become idle, the last ones the least recently used
        among them: a prefix goes after what continues it."""
        one = self._get(sequence)
        del self._sequences[sequence]
        for block in reversed(one.held):
            self._release(block)

    def table(self, sequence: Hashable) -> list[int]:
        """The sequence's blocks in order, with those reserved."""
        return list(self._get(sequence).blocks)

    def tokens(self, sequence: Hashable) -> list[int]:
        return list(self._get(sequence).tokens)

    def sequences(self) -> list[Hashable]:
        return [*self._sequences]

    def forget_prefixes(self) -> None:
        """Shares nothing that is cached or open now with later ones: the weights have changed."""
        for one in self._sequences.values():
            one.prefix = next(self._prefixes)
        self._cached, self._key_of = {}, {}
        self._free += self._idle
        self._idle.clear()

    def check(self) -> None:
        """Walks every invariant; raises RuntimeError that names those that do not hold."""
        broken = broken_rules(
            *(self._references, self._free, self._idle, self._sequences.values()),
            *(self._cached, self._key_of, self.page_size),
        )
        if broken:
            raise RuntimeError(f"BlockManager: broken invariants: {'; '.join(broken)}")

    def _get(self, sequence: Hashable) -> Placed:
        if sequence not in self._sequences:
            raise ValueError(f"BlockManager: sequence must be allocated first, got {sequence!r}")
        return self._sequences[sequence]

    def _of_count(self, method: str, sequence: Hashable, num_tokens: int) -> Placed:
        one = self._get(sequence)
        if not one.num_committed <= num_tokens <= len(one.tokens):
            raise ValueError(
                f"{method}: num_tokens must lie in [{one.num_committed}, {len(one.tokens)}] for "
                f"sequence {sequence!r}, got {num_tokens}"
            )
        return one

    def _cached_prefix(self, tokens: Sequence[int]) -> list[Cached]:
        found: list[Cached] = []
        size, prefix = self.page_size, _NO_PREFIX
        for i in range((len(tokens) - 1) // size if self._cached else 0):
            one = self._cached.get((prefix, tuple(tokens[i * size : (i + 1) * size])))
            if one is None:
                break
            found.append(one)
            prefix = one.prefix
        return found

    def _remember(self, block: int, key: Key) -> int:
        """Caches a block, unless it is or an equal one is; returns the number of its prefix."""
        known = self._cached.get(self._key_of.get(block, key))
        if known is None:
            known = self._cached[key] = Cached(block, next(self._prefixes))
            self._key_of[block] = key
        return known.prefix

    def _require(self, count: int, kept: int = 0) -> None:
        """Raises unless count blocks can be given away and kept idle ones stay."""
        available = self.num_available - kept
        if count > available:
            raise OutOfBlocks(
                f"Out of KV cache memory: {count} more blocks of {self.page_size} tokens needed, "
                f"{available} available of {self.num_blocks} ({self.num_sequences} sequences at "
                "work); free a sequence or use a larger cache"
            )

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._cached[self._key_of.pop(block)]
        self._references[block] = 1
        return block

    def _reference(self, block: int) -> None:
        self._idle.pop(block, None)
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)
