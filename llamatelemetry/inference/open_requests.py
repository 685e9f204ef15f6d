"""Requests that are open: what forwards give them, and how they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from llamatelemetry.inference.beam_group import shown
from llamatelemetry.inference.drawing import Asked, Drawn
from llamatelemetry.inference.interrupts import as_one
from llamatelemetry.inference.plan import Piece
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Scheduler


class OpenRequests:
    """The handles of a batch and its scheduler, kept alike.

    Attributes:
        open: handles of the requests that have not ended, by name, in order of submission.
        incoming: those of them that the scheduler does not know yet; any thread may append.
        scheduler: Scheduler.
    """

    scheduler: Scheduler

    def __init__(self) -> None:
        self.open: dict[object, RequestHandle] = {}
        self.incoming: deque[RequestHandle] = deque()

    def _asked_of(self, request: ScheduledRequest) -> Asked:
        return self.open[request.name].asked

    @as_one
    def submit(self, handles: Sequence[RequestHandle]) -> None:
        """Answers to one prompt, which the first of them computes for all; from any thread,
        without a lock."""
        first, *others = handles
        first.request.siblings = [handle.request for handle in others]
        self.open.update({handle.request.name: handle for handle in handles})
        self.incoming.append(first)

    @as_one
    def _put_down(
        self, piece: Piece, result: list[Drawn] | Exception, preemptions: int | None = None
    ) -> list[RequestHandle]:
        """Notes what a piece's forward gave; returns handles of the requests that it is for. A
        piece that was launched comes with the preemptions that its request had then."""
        request = piece.request
        if request.finish_reason is not None:
            return []
        handles = [self.open[request.name]]
        if preemptions is not None:
            self.scheduler.seen(piece)
        if isinstance(result, Exception):
            self._end(handles[0], result)
            return list(handles[0].together)
        if preemptions in (None, request.preemptions):  # else its blocks are others now
            self.scheduler.computed(piece)
        if result and request.siblings:
            siblings, request.siblings = request.draws_for[1:], []
            for sibling in siblings:
                handles.append(self.open[sibling.name])
                handles[-1].begins()
                self.scheduler.fork(request, sibling)
        for handle, drawn in zip(handles, result, strict=False):
            self._take(handle, drawn)
        return handles if handles[0].group is None else self._advance(handles)

    def _advance(self, handles: list[RequestHandle]) -> list[RequestHandle]:
        """Beams go on, if what may follow is known of all; returns whom that touches."""
        group = handles[0].group
        try:
            is_over = group.advance(self.scheduler)
        except Exception as error:  # of an answer's text, as in _take
            self._end(handles[0], error)
        else:
            if not is_over:
                return handles
            self._end(handles[0])
        return [*handles, *group.handles]

    def _take(self, handle: RequestHandle, drawn: Drawn) -> None:
        try:
            handle.take(drawn)
        except Exception as error:  # of its text, whatever the tokenizer makes of it
            self._end(handle, error)
        else:
            if handle.request.finish_reason is not None:
                self._end(handle)

    def _end(self, handle: RequestHandle, error: BaseException | None = None) -> None:
        """Takes a request out, with those that end with it: finished, cancelled or because of an
        error."""
        for one in handle.together:
            if not one.done():
                self._end_alone(one, error)

    def _end_alone(self, handle: RequestHandle, error: BaseException | None) -> None:
        request = handle.request
        reason = "cancelled" if error is None else "error"
        if request in self.scheduler.running or request in self.scheduler.waiting:
            self.scheduler.end(request, reason)
        request.finish_reason = request.finish_reason or reason
        if handle.group is None and (left := request.draws_for[1:]):  # who go on without it
            request.siblings, left[0].siblings = [], left[1:]
            self.incoming.append(self.open[left[0].name])
        handle.end(error)
        self.open.pop(request.name, None)

    @as_one
    def reap(self) -> list[RequestHandle]:
        """Ends those that were cancelled, and those whose time is over."""
        ended: list[RequestHandle] = []
        for handle in list(self.open.values()):
            late = handle.lateness() if handle.is_limited else None
            if not handle.done() and (late is not None or handle.is_withdrawn):
                if handle in self.incoming:
                    self.incoming.remove(handle)
                self._end(handle, None if handle.is_withdrawn else late)
                ended += handle.together
        return shown(ended)
