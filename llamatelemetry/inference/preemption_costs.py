"""What it takes to give a request its blocks back: copies to the host and back, or its tokens
computed again. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a plan has copies, whose books these costs are of
    from llamatelemetry.inference.plan import Piece

LEAST = 3  # measurements before which a median is not believed
KEPT = 16


class PreemptionCosts:
    """Medians of what the last copies of blocks and the last forwards over prompts took."""

    def __init__(self) -> None:
        self._block_s: deque[float] = deque(maxlen=KEPT)
        self._token_s: deque[float] = deque(maxlen=KEPT)

    def note_copies(self, num_blocks: int, seconds: float) -> None:
        """So many blocks were copied, one way."""
        self._block_s.append(seconds / num_blocks)

    def note_forward(self, pieces: Sequence[Piece], seconds: float) -> None:
        """A forward over pieces was over; what is mostly of those that decode tells nothing."""
        count = sum(piece.end - piece.begin for piece in pieces)
        if count > len(pieces) and count > 2 * sum(piece.is_decode for piece in pieces):
            self._token_s.append(seconds / count)

    def favours_copies(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether so many blocks are copied out and in again sooner than so many tokens are
        computed; yes where either is not known."""
        if min(len(self._block_s), len(self._token_s)) < LEAST:
            return True
        return 2 * num_blocks * median(self._block_s) <= num_tokens * median(self._token_s)
