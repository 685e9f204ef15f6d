"""The rows of a decode step: how many there are, and when they go on as they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from llamatelemetry.inference.plan import Piece
from llamatelemetry.inference.scheduled_request import ScheduledRequest

# Of requests whose next token the host has not seen: where it is.
Places = Mapping[ScheduledRequest, "tuple[Tensor, int]"]
# Rows of the recorded or captured decode steps. Rows too many cost time on the CPU, where a
# recording costs little; a graph costs a capture, and a few rows more next to nothing.
BUCKETS = {"cpu": (*range(1, 9),), "cuda": (1, 2, 4, 8)}


@dataclass(frozen=True)
class LoadedRow:
    """A row of the decode step, as it stands now."""

    request: ScheduledRequest
    length: int  # tokens, that of the step included
    table: list[int]


def wanted_rows(pieces: list[Piece]) -> list[LoadedRow]:
    """The rows of a decode step for these pieces."""
    return [LoadedRow(p.request, p.end, p.table) for p in pieces]


def longer_tables(loaded: list[LoadedRow], wanted: list[LoadedRow]) -> dict[int, list[int]] | None:
    """Tables of the wanted rows that go on from those of the loaded ones; None where rows differ in
    more than that."""
    if len(loaded) != len(wanted):
        return None
    found = {}
    for row, (old, new) in enumerate(zip(loaded, wanted, strict=True)):
        if old.request is not new.request or old.length != new.length:
            return None
        if old.table != new.table:
            if new.table[: len(old.table)] != old.table:
                return None  # a block was copied
            found[row] = new.table
    return found


def drawn_counts(requests: Sequence[ScheduledRequest]) -> list[int]:
    """How many tokens each has drawn, those that the host has not seen included."""
    return [one.num_drawn + one.num_ahead for one in requests]


def moved_on(rows: list[LoadedRow]) -> list[LoadedRow]:
    """Where rows stand after a step."""
    return [LoadedRow(row.request, row.length + 1, row.table) for row in rows]


def buckets_of(device: str, max_rows: int) -> Sequence[int]:
    """Numbers of rows of which there are decode steps, the last at least max_rows."""
    small = BUCKETS.get(device, BUCKETS["cuda"])
    sizes = [*small, *range(16, max_rows + 8, 8)]
    last = next(i for i, size in enumerate(sizes) if size >= max_rows)
    return sizes[: last + 1]
