"""The rows of one generation: what the host knows of them between two steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import SamplingTensors


@dataclass
class Rows:
    """The rows of one generate.

    Attributes:
        width: blocks of the longest row
        tables: blocks of each row
        lengths: tokens of each row, the last included, whose keys are not in the cache
        seen: all tokens of each row, where any has a repetition penalty; else None
        tokens: the last of each row
        count: tokens drawn for each active row
    """

    turn: int
    runner: StepRunner
    blocks: BlockManager
    width: int
    sampling: SamplingTensors
    tables: list[list[int]]
    lengths: list[int]
    seen: list[list[int]] | None = None
    vocab_size: int = 0  # of the logits
    tokens: list[int] = field(default_factory=list)
    active: list[bool] = field(default_factory=list)
    count: int = 0

    def took(self, tokens: list[int]) -> None:
        """Notes what a step has drawn."""
        self.tokens = tokens
        self.count += 1
        for row, token in enumerate(tokens):
            if self.active[row]:
                self.lengths[row] += 1
                if self.seen is not None:
                    self.seen[row].append(token)

    def free(self) -> None:
        for row in reversed(range(len(self.tables))):
            self.blocks.free((self.turn, row))


def prefill_pieces(lengths: Sequence[int], budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts rows of these lengths into (row, begin, end) pieces of at most budget tokens a chunk."""
    pieces: list[tuple[int, int, int]] = []
    room = budget
    for row, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            pieces.append((row, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield pieces
                pieces, room = [], budget
    if pieces:
        yield pieces
