"""What it takes to give a request its blocks back: copies to the host and back, or its tokens
computed again. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a plan has copies, whose books these costs are of
    from llamatelemetry.inference.plan import Piece

LEAST = 3  # measurements before which a median is not believed
KEPT = 16
AGAIN = 8  # of so many requests whose copies are not worth it one is copied, and timed


class PreemptionCosts:
    """Medians of what the last copies of blocks and the last forwards over prompts took."""

    def __init__(self) -> None:
        # Seconds of one block or token, and how many there were.
        self._copies: deque[tuple[float, int]] = deque(maxlen=KEPT)
        self._forwards: deque[tuple[float, int]] = deque(maxlen=KEPT)
        self._is_warm, self._refusals = False, 0

    def note_copies(self, num_blocks: int, seconds: float) -> None:
        """So many blocks were copied, one way. The first to be noted, whose memory nobody has
        touched before, tell nothing."""
        if self._is_warm:
            self._copies.append((seconds / num_blocks, num_blocks))
        self._is_warm = True

    def note_forward(self, pieces: Sequence[Piece], seconds: float) -> None:
        """A forward over pieces was over; what is mostly of those that decode tells nothing."""
        count = sum(piece.end - piece.begin for piece in pieces)
        if count > len(pieces) and count > 2 * sum(piece.is_decode for piece in pieces):
            self._forwards.append((seconds / count, count))

    def favours_copies(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether so many blocks are copied out and in again sooner than so many tokens are
        computed; yes where either is not known, and now and then in any case, for without copies
        what they take is not learnt."""
        if min(len(self._copies), len(self._forwards)) < LEAST:
            return True
        if 2 * num_blocks * _median(self._copies) <= num_tokens * _median(self._forwards):
            return True
        self._refusals += 1
        return self._refusals % AGAIN == 0


def _median(samples: Iterable[tuple[float, int]]) -> float:
    """Of seconds, each counted as often as there were blocks or tokens: a long forward takes less
    time a token than a short one, and most tokens are computed in long ones."""
    ordered = sorted(samples)
    ends = list(accumulate(count for _, count in ordered))
    return next(one for (one, _), end in zip(ordered, ends, strict=True) if 2 * end >= ends[-1])
