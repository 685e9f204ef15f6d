"""What submit gives back: the text of one request as it comes, its end, and its times."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Protocol, cast

from llamatelemetry.inference.drawing import Asked, Drawn, TokenLogprobs
from llamatelemetry.inference.scheduled_request import ScheduledRequest, StopText
from llamatelemetry.profiling.metrics import RequestTimes


class _Text(StopText, Protocol):
    text: str

    def finish(self) -> str: ...


@dataclass(frozen=True)
class RequestStats(RequestTimes):
    """The times of one request, NaN for what has not happened; see ``RequestTimes``. The text of
    beams comes as a whole at the end: first_token is then when their prompt was computed.

    Attributes:
        cached_tokens: leading prompt tokens that the cache held already.
        preemptions: how often its blocks were taken from it, to be computed again.
        drafted_tokens, accepted_tokens: that a speculation drafted, and those of them that the
            model draws too.

    Example:
        >>> handle = ContinuousBatching(4, model).submit([1, 2, 3], max_tokens=2)
        >>> handle.result().stats.num_tokens, handle.stats.cached_tokens
        (2, 0)
    """

    cached_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class RequestResult:
    """A finished request.

    Attributes:
        text: up to a stop string; "" where there is no tokenizer.
        token_ids: all that were drawn, with the one that ended it.
        finish_reason: "stop" or "length".
        stats: RequestStats.
        logprobs: TokenLogprobs of each token, where LogitOptions asked for them.

    Example:
        >>> handle = ContinuousBatching(4, model).submit([1, 2, 3], max_tokens=2)
        >>> handle.result().finish_reason
        'length'
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: RequestStats
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class TimeLimits:
    """How long a request may take, in seconds from when it came; inf for no limit.

    Attributes:
        whole: until its end.
        waiting: until its first forward.
    """

    whole: float = math.inf
    waiting: float = math.inf


class RequestHandle:
    """A request that was submitted. Whoever waits for it runs the steps, if no other thread does.

    Iterating gives its text in pieces; ``tokens`` gives its token ids. In a coroutine ``async for``
    gives its text and ``await`` its result, while a thread runs the steps.

    Attributes:
        error: what ended it, if an exception did.
        asked: its SamplingParams and LogitOptions.
        is_limited: whether its time may ever be over.
        logprobs: TokenLogprobs of each token so far, where its LogitOptions ask for them.
        is_hidden: whether it is that of a beam, and no answer's.
        group: BeamGroup of its beam; None of others.

    Example:
        >>> batcher = ContinuousBatching(4, model)
        >>> first, second = (batcher.submit(ids, max_tokens=3) for ids in ([1, 2], [3]))
        >>> len(list(first.tokens()))  # runs the steps of both
        3
        >>> second.cancel(), second.done()
        (False, True)
    """

    is_hidden = False
    group: Any = None

    def __init__(
        self,
        request: ScheduledRequest,
        asked: Asked,
        drive: Callable[[Callable[[], bool], float | None], None],
        withdraw: Callable[[], None],
        limits: TimeLimits,
    ) -> None:
        self.request, self.asked = request, asked
        self.logprobs: list[TokenLogprobs] = []
        self.error: BaseException | None = None
        self.is_withdrawn = self._is_done = False
        self._text = cast("_Text | None", request.text)
        self._pieces: list[str] = []
        self._ends: list[int] = []  # tokens drawn when each piece was certain
        self._limits, self.is_limited = limits, limits != TimeLimits()
        self._drive, self._withdraw = drive, withdraw
        self._enqueued = time.perf_counter()
        self._started = self._first = self._last = math.nan

    def __repr__(self) -> str:
        state = self.request.finish_reason or "open"
        return f"<RequestHandle {self.request.name}: {state}, {self.request.num_drawn} tokens>"

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._is_done

    def cancelled(self) -> bool:
        return self._is_done and self.request.finish_reason == "cancelled"

    def cancel(self) -> bool:
        """Ends it before the next step, at once where no step is in progress.

        Returns:
            False if it has ended already.
        """
        if self.done():
            return False
        self.is_withdrawn = True
        self._withdraw()
        return True

    def result(self, timeout: float | None = None) -> RequestResult:
        """Waits for the end.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TimeoutError: it has not ended by then; it goes on.
            CancelledError: it was cancelled.
            Exception: what ended it.
        """
        self._drive(self.done, timeout)
        if self.cancelled():
            raise CancelledError
        if self.error is not None:
            raise self.error
        text = "" if self._text is None else self._text.text
        logprobs = None if self.asked.options.logprobs is None else list(self.logprobs)
        reason = str(self.request.finish_reason)
        return RequestResult(text, self.token_ids, reason, self.stats, logprobs)

    def __iter__(self) -> Iterator[str]:
        """Pieces of the text as they come; ends where the request is cancelled.

        Raises:
            ValueError: there is no tokenizer.
            Exception: what ended the request.
        """
        if self._text is None:
            raise ValueError("the text of a request needs an engine with a tokenizer; see tokens()")
        return self._follow(self._pieces)

    async def __aiter__(self) -> AsyncIterator[str]:
        """As iterating, for coroutines."""
        pieces, end = iter(self), object()
        while (piece := await asyncio.to_thread(next, pieces, end)) is not end:
            yield cast("str", piece)

    def __await__(self) -> Generator[Any, None, RequestResult]:
        """As result; a coroutine that is cancelled cancels the request that it waits for."""
        return self._awaited().__await__()

    async def _awaited(self) -> RequestResult:
        try:
            return await asyncio.to_thread(self.result)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def tokens(self) -> Iterator[int]:
        """Token ids as they come; ends and raises as iterating does."""
        drawn = self.request.tokens
        return self._follow(drawn, len(self.request.prompt))

    def _follow(self, items: list[Any], begin: int = 0) -> Iterator[Any]:
        count = begin

        def has_more() -> bool:
            return len(items) > count

        while True:
            self._drive(lambda: has_more() or self._is_done, None)
            if not has_more():
                break
            yield items[count]
            count += 1
        if self.error is not None:
            raise self.error

    def pieces_from(self, index: int) -> tuple[list[str], bool]:
        """Pieces of the text from one on, and whether there will be no more; never waits."""
        is_done = self._is_done  # first: what came before the end is then seen
        return self._pieces[index:], is_done

    def drawn_by(self, piece: int) -> int:
        """How many tokens were drawn when a piece of the text was certain."""
        return self._ends[piece]

    @property
    def together(self) -> Sequence[RequestHandle]:
        """Handles that end with it."""
        return [self]

    @property
    def token_ids(self) -> list[int]:
        """Those drawn so far."""
        return self.request.tokens[len(self.request.prompt) :]

    @property
    def stats(self) -> RequestStats:
        """Its times and counts so far."""
        request = self.request
        cached = request.num_cached or 0
        return RequestStats(
            enqueued=self._enqueued,
            started=self._started,
            first_token=self._first,
            last_token=self._last,
            num_prompt_tokens=len(request.prompt) - cached,
            num_tokens=request.num_drawn,
            cached_tokens=cached,
            preemptions=request.preemptions,
            drafted_tokens=request.num_drafted,
            accepted_tokens=request.num_accepted,
        )

    # ---- For the batcher ----

    def begins(self) -> None:
        """The first forward for it begins."""
        if math.isnan(self._started):
            self._started = time.perf_counter()

    def lateness(self) -> TimeoutError | None:
        """Why its time is over, if it is."""
        passed, limits = time.perf_counter() - self._enqueued, self._limits
        if passed >= limits.whole:
            return TimeoutError(f"the request must end within {limits.whole:g} s, it has not")
        if math.isnan(self._started) and passed >= limits.waiting:
            return TimeoutError(
                f"the request must begin within {limits.waiting:g} s, it still waits for others"
            )
        return None

    def take(self, drawn: Drawn) -> None:
        """A token was drawn."""
        self._last = time.perf_counter()
        if math.isnan(self._first):
            self._first = self._last
        request, matcher = self.request, self.asked.matcher
        if matcher is not None:
            matcher.accept(drawn.token)
        if drawn.logprobs is not None:
            self.logprobs.append(drawn.logprobs)
        piece = request.take(drawn.token)
        if matcher is not None and matcher.is_complete:
            request.finish_reason = request.finish_reason or "stop"
        if request.finish_reason is not None and self._text is not None:
            piece += self._text.finish()
        if piece:
            self._ends.append(request.num_drawn)
            self._pieces.append(piece)

    def end(self, error: BaseException | None) -> None:
        """It has ended; the last that is done to it, for other threads look on."""
        self.error = error
        self._is_done = True
