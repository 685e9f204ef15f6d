"""The rows of a decode step: how many there are, and when they go on as they stand."""

from __future__ import annotations

from collections.abc import Sequence

from llamatelemetry.inference.plan import Piece
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.step import Chunk

# Rows of the recorded or captured decode steps. Rows too many cost time on the CPU, where a
# recording costs little; a graph costs a capture, and a few rows more next to nothing.
BUCKETS = {"cpu": (*range(1, 9),), "cuda": (1, 2, 4, 8)}


def added_blocks(
    ran: Sequence[Piece], wanted: Sequence[Piece]
) -> list[tuple[int, int, int]] | None:
    """(row, column, block) of what the tables of a decode step's wanted rows have more than those
    that it ran last, each of which goes on by the one token that it drew; None where rows differ in
    more than that."""
    if len(ran) != len(wanted):
        return None
    found = []
    for row, (old, new) in enumerate(zip(ran, wanted, strict=True)):
        if old.request is not new.request or old.end != new.begin:
            return None
        if old.table is not new.table:
            first = len(old.table)
            if new.table[:first] != old.table:
                return None  # a block was copied
            found += [(row, first + i, block) for i, block in enumerate(new.table[first:])]
    return found


def is_ahead(piece: Piece) -> bool:
    """Whether its token is one that the host has not seen."""
    return piece.begin >= len(piece.request.tokens)


def chunk_of(piece: Piece) -> Chunk:
    """Its tokens for a forward; 0 in the place of one that the host has not seen."""
    return Chunk(piece.request.tokens[piece.begin : piece.end] or [0], piece.begin, piece.table)


def placed(pieces: Sequence[Piece], rows: int) -> tuple[list[Chunk], list[bool]]:
    """Rows of a decode step, and which of them are active."""
    spare = rows - len(pieces)
    chunks = [chunk_of(piece) for piece in pieces]
    # A spare row reads a key that there is, whatever it holds, and writes nothing.
    chunks += [Chunk([0], 0, pieces[0].table[:1])] * spare
    return chunks, [True] * len(pieces) + [False] * spare


def drawn_counts(requests: Sequence[ScheduledRequest]) -> list[int]:
    """How many tokens each has drawn, those that the host has not seen included."""
    return [one.num_drawn + one.num_ahead for one in requests]


def buckets_of(device: str, max_rows: int) -> Sequence[int]:
    """Numbers of rows of which there are decode steps, the last at least max_rows."""
    small = BUCKETS.get(device, BUCKETS["cuda"])
    sizes = [*small, *range(16, max_rows + 8, 8)]
    last = next(i for i, size in enumerate(sizes) if size >= max_rows)
    return sizes[: last + 1]
