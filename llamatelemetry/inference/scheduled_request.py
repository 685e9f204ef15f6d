"""A request as the scheduler sees it: tokens, limits and how far it is. No torch."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class StopText(Protocol):
    """What watches a request's text for stop strings, as TextStream does."""

    stopped: bool

    def push(self, token_id: int) -> str: ...


@dataclass(eq=False)
class ScheduledRequest:
    """One sequence to be generated.

    Attributes:
        name: names its blocks.
        prompt: token ids, at least one.
        max_tokens: tokens drawn at most.
        min_tokens: before so many are drawn, none of stop_ids may be.
        stop_ids: the first of these ends it; it is kept as the last token.
        priority: lower goes first.
        arrival: a number that grows; decides among equal priorities.
        text: watches for stop strings; None watches for nothing.
        siblings: other answers to its prompt, whose first tokens are drawn with its own, from the
            same logits; they are in no queue until then.
        tokens: of the prompt, then those drawn.
        num_computed: leading tokens whose keys and values are in the cache, or will be once the
            forwards that were launched are over.
        num_placed: leading tokens that the block manager knows; 0 while it has no blocks. It is
            told of drawn ones when they fill a block.
        room: tokens that its blocks hold which it may write to; 0 where that is not known.
        table: its blocks; another list where they change.
        speculates: whether tokens may be drafted for it.
        is_beam: whether it waits for other beams, with no token left, before it goes on.
        draft: tokens that may follow those in tokens, for the next plan to try.
        num_ahead: tokens that follow those in tokens, which forwards that were launched draw and
            which the host has not seen.
        num_cached: leading tokens whose keys and values were in the cache already, at first.
        preemptions: how often its blocks were taken from it.
        num_drafted, num_accepted: drafted tokens that were checked, and those that were right.
        finish_reason: "stop", "length", "cancelled" or "error"; None while it is open.
    """

    name: Hashable
    prompt: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    stop_ids: Collection[int] = ()
    priority: int = 0
    arrival: int = 0
    text: StopText | None = None
    siblings: list[ScheduledRequest] = field(default_factory=list)
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    num_placed: int = 0
    room: int = 0
    table: list[int] = field(default_factory=list)
    num_ahead: int = 0
    num_cached: int | None = None
    preemptions: int = 0
    speculates: bool = True
    is_beam: bool = False
    draft: Sequence[int] = ()
    num_drafted: int = 0
    num_accepted: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first and is preempted last."""
        return self.priority, self.arrival

    @property
    def num_drawn(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def num_left(self) -> int:
        """Tokens that a forward has still to run on before the next one can be drawn."""
        return len(self.tokens) + self.num_ahead - self.num_computed

    @property
    def is_drawn_out(self) -> bool:
        """Whether the tokens that it will have once those ahead are seen are all it may have."""
        return self.num_ahead > 0 and self.num_drawn + self.num_ahead >= self.max_tokens

    @property
    def most_tokens(self) -> int:
        """How long it may become."""
        return len(self.prompt) + self.max_tokens

    @property
    def draws_for(self) -> list[ScheduledRequest]:
        """Itself, and the siblings that are open: whose tokens its next logits give."""
        return [self, *(one for one in self.siblings if one.finish_reason is None)]

    @property
    def forbidden(self) -> Collection[int]:
        """Tokens that may not be drawn next."""
        return self.stop_ids if self.num_drawn < self.min_tokens else ()

    def take(self, token: int) -> str:
        """Adds a drawn token, ends the request where it is the last; returns the text that it
        makes certain."""
        self.tokens.append(token)
        is_stop = token in self.stop_ids and self.num_drawn > self.min_tokens
        piece = "" if self.text is None else self.text.push(token)
        if is_stop or (self.text is not None and self.text.stopped):
            self.finish_reason = "stop"
        elif self.num_drawn >= self.max_tokens:
            self.finish_reason = "length"
        return piece


def insert(queue: list[ScheduledRequest], request: ScheduledRequest) -> None:
    """Puts a request into a queue that is in order of rank."""
    bisect.insort(queue, request, key=lambda one: one.rank)


def in_order(queue: Iterable[ScheduledRequest]) -> bool:
    """Whether a queue is in order of rank."""
    ranks = [request.rank for request in queue]
    return ranks == sorted(ranks)
