"""What a BlockManager notes of sequences and blocks, and the rules that hold between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

# A full block's key: the prefix before it and its own tokens. A dict compares the tokens wherever
# hashes are equal, and no number of a prefix is given twice, so equal keys mean equal tokens from
# the sequence's first on.
Key = tuple[int, tuple[int, ...]]


@dataclass
class Placed:
    """A sequence and its blocks."""

    tokens: list[int]
    blocks: list[int]
    num_committed: int  # tokens whose keys and values are written
    prefix: int  # number of the prefix that the committed full blocks make
    num_hidden: int = 0  # leading blocks that it has given back; their numbers stay

    @property
    def held(self) -> list[int]:
        """The blocks that it references."""
        return self.blocks[self.num_hidden :] if self.num_hidden else self.blocks


@dataclass(frozen=True)
class Cached:
    """A block that is cached under its tokens."""

    block: int
    prefix: int  # number of the prefix that ends with this block


def broken_rules(
    references: Sequence[int],
    free: Sequence[int],
    idle: Collection[int],
    sequences: Iterable[Placed],
    cached: Mapping[Key, Cached],
    key_of: Mapping[int, Key],
    page_size: int,
) -> list[str]:
    """The invariants of a BlockManager, whose attributes these are, that do not hold."""
    numbers, sequences = range(len(references)), list(sequences)
    held = Counter(block for one in sequences for block in one.held)
    states = Counter([*free, *idle, *held.keys()])
    rules = {
        "every block is free, idle or referenced, and only one of these": states
        == Counter(numbers),
        "a block has as many references as tables hold it": (
            list(references) == [held[block] for block in numbers]
        ),
        "no sequence holds a block twice": all(
            len(set(one.held)) == len(one.held) for one in sequences
        ),
        "a sequence has blocks for all its tokens": all(
            len(one.blocks) * page_size >= len(one.tokens) and one.num_committed <= len(one.tokens)
            for one in sequences
        ),
        "blocks that are given back hold committed tokens": all(
            one.num_hidden * page_size <= one.num_committed for one in sequences
        ),
        "reserved blocks are the sequence's own": all(
            references[block] == 1
            for one in sequences
            for block in one.blocks[-(-len(one.tokens) // page_size) :]
        ),
        "cached blocks and their keys are one to one": (
            key_of == {one.block: key for key, one in cached.items()} and len(key_of) == len(cached)
        ),
        "cached blocks are idle or referenced": (
            set(idle) <= key_of.keys() and not key_of.keys() & set(free)
        ),
        "cached blocks are full ones": all(len(tokens) == page_size for _, tokens in cached),
    }
    return [rule for rule, holds in rules.items() if not holds]
