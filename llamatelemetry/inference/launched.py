"""What forwards that were launched draw, until the host sees it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llamatelemetry.inference.decode_rows import is_ahead
from llamatelemetry.inference.drawing import Drawn
from llamatelemetry.inference.plan import Piece
from llamatelemetry.inference.preemption_costs import PreemptionCosts
from llamatelemetry.inference.sampling import nan_error
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.step import take_ids
from llamatelemetry.inference.stopwatch import Stopwatch

# One token for each of piece.request.draws_for; none where the piece draws nothing.
Result = tuple[Piece, "list[Drawn] | Exception"]


class Launched:
    """The tokens of one plan's forwards, on their way to the host.

    Attributes:
        pieces: of the plan, in the order of its forwards.

    Args:
        costs: told what the forwards took, once they are over.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, costs: PreemptionCosts | None = None
    ) -> None:
        self.pieces: list[Piece] = []
        self._drawn: list[tuple[list[Piece], Tensor]] = []  # pieces that draw, their tokens
        self._dtype = dtype
        self._copies: list[Tensor] = []
        self._rows: list[tuple[int, int] | None] = []  # of each piece which copy, which row
        self._costs, self._watch = costs, Stopwatch(device)

    def add(self, pieces: Sequence[Piece], drawn: Tensor | None) -> None:
        """Notes a forward.

        Args:
            pieces: that it ran on.
            drawn: [rows] int64, the tokens of those pieces that draw, in order, then whatever
                follows; None where none draws.
        """
        draws = [piece for piece in pieces if piece.draws]
        if drawn is not None:
            if drawn.is_cuda:
                copy = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
                self._copies.append(copy.copy_(drawn, non_blocking=True))
            else:  # on the CPU the next run overwrites it at once
                drawn = drawn.clone()
                self._copies.append(drawn)
            self._drawn.append((draws, drawn))
        rows = iter(range(len(draws)))
        copy_index = len(self._copies) - 1
        self._rows += [(copy_index, next(rows)) if piece.draws else None for piece in pieces]
        self.pieces += pieces

    @property
    def places(self) -> dict[ScheduledRequest, tuple[Tensor, int]]:
        """Of each request that draws the tensor on the device that holds its token, or -1 for NaN,
        and where in it; good until the next plan is launched."""
        return {
            piece.request: (tokens, i)
            for draws, tokens in self._drawn
            for i, piece in enumerate(draws)
        }

    def seal(self) -> None:
        """Nothing is added any more."""
        self._watch.stop()

    def results(self) -> list[Result]:
        """Each piece with what was drawn after it; waits until the forwards are over."""
        self._watch.wait()
        if self._costs is not None:
            self._costs.note_forward(self.pieces, self._watch.seconds())
        tokens = [copy.tolist() for copy in self._copies]
        found: list[Result] = []
        for piece, row in zip(self.pieces, self._rows, strict=True):
            if row is None:
                found.append((piece, []))
            elif (token := tokens[row[0]][row[1]]) < 0:
                found.append((piece, nan_error(self._dtype)))
            else:
                found.append((piece, [Drawn(token)]))
        return found


def take_ahead(input_ids: Tensor, rows: Sequence[Piece], before: Launched | None) -> None:
    """Puts the tokens of rows that the host has not seen in place.

    Args:
        input_ids: [num_tokens] int64, the rows' first.
        rows: pieces of one token.
        before: the plan that draws what is not seen.
    """
    if ahead := [i for i, piece in enumerate(rows) if is_ahead(piece)]:
        assert before is not None
        places = before.places
        take_ids(input_ids, ahead, [places[rows[i].request] for i in ahead])


class Flight:
    """A plan that was launched, whose tokens nobody has looked at."""

    def __init__(self, launched: Launched, pieces: Sequence[Piece]) -> None:
        self.launched = launched
        self.preemptions = {piece.request: piece.request.preemptions for piece in pieces}
        self._results: deque[Result] | None = None

    def results(self) -> Iterator[Result]:
        """Each once, however often the caller is interrupted."""
        if self._results is None:
            self._results = deque(self.launched.results())
        while self._results:
            yield self._results.popleft()
