"""The beams of one prompt as requests of a batch, which share blocks and go on together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

from llamatelemetry.inference.beam_search import BeamParams, BeamSearch, Best
from llamatelemetry.inference.drawing import Asked, Drawn
from llamatelemetry.inference.plan import Plan
from llamatelemetry.inference.request_handle import RequestHandle, TimeLimits
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Scheduler


class BeamGroup:
    """A search whose every beam is a request.

    A beam whose next tokens are known waits, with no token left to run on, until those of all
    beams are. Then each goes on from the beam that the search says, by a fork of its blocks.

    Args:
        requests: one for each beam; equal but for their names.
        params: BeamParams, of as many beams.

    Attributes:
        handles: one for each request, those of the answers first.
    """

    def __init__(self, requests: Sequence[ScheduledRequest], params: BeamParams) -> None:
        first = requests[0]
        limits = first.max_tokens, first.min_tokens, first.stop_ids
        self.search = BeamSearch(params, *limits)
        self.handles: list[BeamHandle] = []
        self._requests = requests
        self._best: dict[ScheduledRequest, Best] = {}

    def note(self, request: ScheduledRequest, best: Best) -> None:
        """Tells of the tokens that may follow a beam."""
        self._best[request] = best

    def advance(self, scheduler: Scheduler) -> bool:
        """All beams by one token, if what may follow is known of all.

        Args:
            scheduler: where they are at work.

        Returns:
            Whether the search is over; the answers have their tokens then.
        """
        # Whose blocks were taken meanwhile is computed again, and tells of its tokens again.
        if any(one.num_left or one not in self._best for one in self._requests):
            return False
        parents = self.search.step([self._best.pop(one) for one in self._requests])
        if parents is None:
            for handle, answer in zip(self.handles, self.search.answers, strict=True):
                handle.answered(answer.tokens)
            return True
        _fork(scheduler, self._requests, parents)
        for request, tokens in zip(self._requests, self.search.beams, strict=True):
            request.tokens = [*request.prompt, *tokens]
        return False


class BeamHandle(RequestHandle):
    """The handle of an answer, whose text comes as a whole at the end; or of no more than a beam.

    Attributes:
        is_hidden: whether it is no answer's.
        group: BeamGroup; what ends one of its handles ends all.
    """

    def __init__(
        self,
        request: ScheduledRequest,
        group: BeamGroup,
        is_hidden: bool,
        drive: Callable[[Callable[[], bool], float | None], None],
        withdraw: Callable[[], None],
        limits: TimeLimits,
    ) -> None:
        asked = Asked(GREEDY, num_candidates=group.search.num_candidates)
        super().__init__(request, asked, drive, withdraw, limits)
        self.is_hidden, self.group = is_hidden, group
        self._answer: list[int] = []

    @property
    def together(self) -> Sequence[RequestHandle]:
        return self.group.handles

    @property
    def token_ids(self) -> list[int]:
        """Of the answer; none before its end."""
        return list(self._answer)

    def tokens(self) -> Iterator[int]:
        return self._follow(self._answer)

    def take(self, drawn: Drawn) -> None:
        """What may follow the beam is known."""
        self._last = time.perf_counter()
        if math.isnan(self._first):
            self._first = self._last
        assert drawn.logprobs is not None  # asked for by num_candidates
        self.group.note(self.request, drawn.logprobs.top)

    def answered(self, tokens: list[int]) -> None:
        """The search is over."""
        request = self.request
        request.tokens = [*request.prompt, *tokens]
        request.finish_reason = "stop" if tokens[-1] in request.stop_ids else "length"
        if self.is_hidden:
            return
        self._answer += tokens
        if self._text is not None:
            piece = "".join(self._text.push(token) for token in tokens) + self._text.finish()
            if piece:
                self._ends.append(len(tokens))
                self._pieces.append(piece)


def beam_handles(
    requests: Sequence[ScheduledRequest],
    num_answers: int,
    params: BeamParams,
    drive: Callable[[Callable[[], bool], float | None], None],
    withdraw: Callable[[], None],
    limits: TimeLimits,
) -> list[RequestHandle]:
    """Handles of the beams of one search.

    Args:
        requests: one for each beam.
        num_answers: of the best; their handles come first, the others are hidden.
        params: BeamParams.
        drive, withdraw, limits: as RequestHandle's.
    """
    group = BeamGroup(requests, params)
    group.handles = [
        BeamHandle(one, group, i >= num_answers, drive, withdraw, limits)
        for i, one in enumerate(requests)
    ]
    return list(group.handles)


def shown(handles: Sequence[RequestHandle]) -> list[RequestHandle]:
    """Each that is not hidden, once, in order."""
    return [handle for handle in dict.fromkeys(handles) if not handle.is_hidden]


def make_way(scheduler: Scheduler, plan: Plan) -> None:
    """Where nothing is planned, for all at work are beams that wait for others which do not get
    blocks or a place: the last gives its own up."""
    running = scheduler.running
    if not running or not scheduler.waiting or plan.pieces:
        return
    if all(one.is_beam and not one.num_left for one in running):
        plan.preempted.append(running[-1])
        scheduler.preempt(running[-1], plan)


def _fork(
    scheduler: Scheduler, requests: Sequence[ScheduledRequest], parents: Sequence[int]
) -> None:
    """Each request has from now on the blocks of another, or its own.

    Args:
        scheduler: where all are at work, with no token left to run on.
        requests: of as many tokens each.
        parents: of each, whose blocks.
    """
    blocks = scheduler.blocks
    for one in requests:  # what was drawn is told when it fills a block, or now
        blocks.append(one.name, one.tokens[one.num_placed : one.num_computed])
        one.num_placed = one.num_computed
    moved = [(requests[i], requests[parent]) for i, parent in enumerate(parents) if i != parent]
    for one, parent in moved:
        blocks.fork(parent.name, (one.name, "next"))
    for one, _ in moved:
        blocks.free(one.name)
    for one, _ in moved:
        blocks.fork((one.name, "next"), one.name)
        blocks.free((one.name, "next"))
    for one in requests:
        one.table, one.room = blocks.table(one.name), 0  # who writes first copies the last block
