"""What a request's times amount to: TTFT, TPOT, rates, percentiles. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def time_to_first_token(enqueued: float, first_token: float) -> float:
    """TTFT: ``first_token - enqueued``, so waiting in the queue counts.

    Args:
        enqueued: when the request was handed in, in seconds of any one clock.
        first_token: when its first token was there.

    Returns:
        Seconds.

    Raises:
        ValueError: first_token is before enqueued.

    Example:
        >>> time_to_first_token(enqueued=10.0, first_token=10.25)
        0.25
    """
    return _span("time_to_first_token", "first_token", enqueued, first_token)


def time_per_output_token(first_token: float, last_token: float, num_tokens: int) -> float:
    """TPOT: ``(last_token - first_token) / (num_tokens - 1)``.

    Args:
        first_token: when the first token was there, in seconds of any one clock.
        last_token: when the last one was.
        num_tokens: tokens generated, the first included.

    Returns:
        Seconds; NaN for fewer than two tokens, which have no time between them.

    Raises:
        ValueError: last_token is before first_token.

    Example:
        >>> time_per_output_token(first_token=10.0, last_token=12.0, num_tokens=5)
        0.5
    """
    seconds = _span("time_per_output_token", "last_token", first_token, last_token)
    return seconds / (num_tokens - 1) if num_tokens > 1 else math.nan


@dataclass(frozen=True)
class RequestTimes:
    """The times of one request, in seconds of one clock, and its counts of tokens.

    Attributes:
        enqueued: when it was handed in.
        started: when its prefill began.
        first_token: when its first token was there.
        last_token: when its last token was there.
        num_prompt_tokens: tokens that the prefill computed.
        num_tokens: tokens generated.

    Example:
        >>> request = RequestTimes(0.0, 0.5, 1.0, 3.0, num_prompt_tokens=64, num_tokens=5)
        >>> request.ttft, request.tpot, request.queue_delay
        (1.0, 0.5, 0.5)
        >>> request.prefill_tokens_per_second, request.decode_tokens_per_second
        (128.0, 2.0)
    """

    enqueued: float
    started: float
    first_token: float
    last_token: float
    num_prompt_tokens: int
    num_tokens: int

    @property
    def ttft(self) -> float:
        """Time to the first token, seconds."""
        return time_to_first_token(self.enqueued, self.first_token)

    @property
    def tpot(self) -> float:
        """Time per output token after the first, seconds; NaN for a single token."""
        return time_per_output_token(self.first_token, self.last_token, self.num_tokens)

    @property
    def queue_delay(self) -> float:
        """From enqueued to started, seconds."""
        return _span("queue_delay", "started", self.enqueued, self.started)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens over the time from started to the first token."""
        seconds = _span("prefill rate", "first_token", self.started, self.first_token)
        return self.num_prompt_tokens / seconds if seconds > 0 else math.nan

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time that they took; NaN for a single token."""
        seconds = _span("decode rate", "last_token", self.first_token, self.last_token)
        return (self.num_tokens - 1) / seconds if seconds > 0 else math.nan


def percentile(values: Iterable[float], q: float) -> float:
    """The q-th percentile, interpolated linearly between the two nearest values, as numpy's.

    Args:
        values: any order; NaN is left out.
        q: 0 to 100.

    Returns:
        The percentile; NaN of no values.

    Raises:
        ValueError: q is not between 0 and 100.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 50)
        2.5
    """
    if not 0 <= q <= 100:
        raise ValueError(f"percentile: q must be between 0 and 100, got {q}")
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * q / 100
    below, above = math.floor(place), math.ceil(place)
    if below == above:  # the difference of two infinities would be NaN
        return ordered[below]
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def percentiles(values: Iterable[float], qs: Sequence[float] = (50, 95, 99)) -> dict[str, float]:
    """Several percentiles by name.

    Args:
        values: any order; NaN is left out.
        qs: each 0 to 100.

    Returns:
        {"p50": ..., "p95": ..., "p99": ...}.

    Example:
        >>> percentiles(range(101))
        {'p50': 50, 'p95': 95, 'p99': 99}
    """
    kept = list(values)
    return {f"p{q:g}": percentile(kept, q) for q in qs}


_METRICS = ("ttft", "tpot", "queue_delay", "prefill_tokens_per_second", "decode_tokens_per_second")


def summarise(requests: Iterable[RequestTimes]) -> dict[str, dict[str, float]]:
    """p50, p95 and p99 of every metric over requests.

    Args:
        requests: the finished ones.

    Returns:
        Metric (a property of RequestTimes) -> percentiles.

    Example:
        >>> summarise([RequestTimes(0.0, 0.5, 1.0, 3.0, 64, 5)])["ttft"]
        {'p50': 1.0, 'p95': 1.0, 'p99': 1.0}
    """
    done = list(requests)
    return {name: percentiles(getattr(request, name) for request in done) for name in _METRICS}


def _span(who: str, name: str, start: float, end: float) -> float:
    if end < start:
        raise ValueError(f"{who}: {name} must not be before {start}, got {end}")
    return end - start
