"""One step, as a scheduler plans it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from llamatelemetry.inference.host_blocks import Pairs
from llamatelemetry.inference.scheduled_request import ScheduledRequest


class Piece(NamedTuple):
    """Tokens [begin, end) of a request, on which one forward runs."""

    request: ScheduledRequest
    begin: int
    end: int
    table: list[int]  # blocks of the request; replaced by another list where they change
    draws: bool  # whether the next token is drawn from the last one's logits
    draft: tuple[int, ...] = ()  # tokens that may come next, on which the forward runs too

    @property
    def is_decode(self) -> bool:
        """Whether it is one drawn token, and not of a prompt or computed again."""
        return self.draws and self.end - self.begin == 1 and self.begin >= len(self.request.prompt)


@dataclass
class Plan:
    """One step.

    Attributes:
        pieces: at most one a request: first those that decode, then prompts.
        swaps_out, swaps_in: (cache, host) and (host, cache) of blocks to be copied first of all;
            one of the two is empty.
        copies: (source, destination) of blocks to be copied before.
        preempted: requests that gave their blocks up for this step.
        num_drafted, num_accepted: once the step is over, drafted tokens that were checked, and
            those of them that the model drew too.
        num_won: tokens that were drawn beside one of each piece; fewer than were right by one where
            the last of these ended its request.
    """

    pieces: list[Piece] = field(default_factory=list)
    swaps_out: Pairs = field(default_factory=list)
    swaps_in: Pairs = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[ScheduledRequest] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0
    num_won: int = 0

    def beginning(self) -> list[ScheduledRequest]:
        """Requests of which this may be the first forward: it runs on tokens of their prompts."""
        return [one.request for one in self.pieces if one.begin < len(one.request.prompt)]

    @property
    def num_tokens(self) -> int:
        return sum(piece.end - piece.begin for piece in self.pieces)

    @property
    def has_drafts(self) -> bool:
        return any(piece.draft for piece in self.pieces)
