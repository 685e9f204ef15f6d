"""What a batch has done lately: its steps, the requests that ended, and what they amount to."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamatelemetry.inference.request_handle import RequestHandle, RequestStats
from llamatelemetry.inference.running_batch import RunningBatch
from llamatelemetry.profiling.metrics import percentiles, summarise

_COUNTS = (
    "prompt_tokens",
    "decode_tokens",
    "preemptions",
    "drafted_tokens",
    "accepted_tokens",
)
KEPT = 4096  # steps and requests that are remembered


@dataclass(frozen=True)
class StepStats:
    """One step of a batch.

    Attributes:
        begin, end: seconds of time.perf_counter.
        prompt_tokens: of prompts, that its forwards ran on.
        decode_tokens: that they ran on to draw the next one, right drafts among them.
        running, waiting: requests at work and in the queue after it; where steps overlap, the last
            one's are those once its tokens were looked at.
        used_blocks, num_blocks: of the cache, likewise; cached ones that nobody uses are not used.
        preemptions: requests that gave their blocks up for it, or since the step before.
        drafted_tokens, accepted_tokens: that a speculation drafted, and those that were right.

    Example:
        >>> step = StepStats(1.0, 1.5, 64, 4, running=5, waiting=0, used_blocks=6, num_blocks=8)
        >>> step.seconds, step.cache_usage
        (0.5, 0.75)
    """

    begin: float
    end: float
    prompt_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    used_blocks: int
    num_blocks: int
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def cache_usage(self) -> float:
        """The part of the cache's blocks that sequences hold."""
        return self.used_blocks / self.num_blocks if self.num_blocks else 0.0


@dataclass(frozen=True)
class EndedRequest:
    """A request that has ended: its number, its times and counts, why it ended, and when that was
    noticed, in seconds of time.perf_counter."""

    number: int
    stats: RequestStats
    reason: str
    ended: float


class Telemetry:
    """The last steps and requests of a ContinuousBatching, as objects; any thread may read them.

    Args:
        batch: RunningBatch whose open requests the summary tells of; None has none.

    Attributes:
        steps: StepStats of the last 4096 steps that ran a forward, the latest last.
        requests: likewise of those that ended: their number, RequestStats and finish_reason.
        listeners: called with each StepStats, in the thread that ran the step.

    Example:
        >>> batcher = ContinuousBatching(4, model)
        >>> handle = batcher.submit([1, 2, 3], max_tokens=2)
        >>> ended = batcher.run()
        >>> [(step.prompt_tokens, step.decode_tokens) for step in batcher.telemetry.steps]
        [(3, 0), (0, 1)]
        >>> sorted(batcher.telemetry.summary())[:3]
        ['accepted_tokens', 'cache_usage', 'cached_tokens']
    """

    def __init__(self, batch: RunningBatch | None = None) -> None:
        self._batch = batch
        self.steps: deque[StepStats] = deque(maxlen=KEPT)
        self.requests: deque[EndedRequest] = deque(maxlen=KEPT)
        self.listeners: list[Callable[[StepStats], None]] = []
        self._preemptions = 0  # of plans without a forward, for the next step's count

    def summary(self, last_s: float | None = None) -> dict[str, Any]:
        """Counts, rates and percentiles.

        Args:
            last_s: of the last so many seconds; None is of all that is remembered.

        Returns:
            Requests, tokens, drafts, preemptions; rates over the time that the steps cover; p50,
            p95 and p99 of ttft, tpot and queue_delay in seconds; what is open now.
        """
        since = -float("inf") if last_s is None else time.perf_counter() - last_s
        steps = [one for one in list(self.steps) if one.end >= since]
        ended = [one for one in list(self.requests) if one.ended >= since]
        times = summarise(one.stats for one in ended)
        span = steps[-1].end - steps[0].begin if steps else 0.0
        counts = {name: sum(getattr(step, name) for step in steps) for name in _COUNTS}
        return {
            "requests": len(ended),
            "steps": len(steps),
            **counts,
            "prompt_tokens_per_second": counts["prompt_tokens"] / span if span else 0.0,
            "decode_tokens_per_second": counts["decode_tokens"] / span if span else 0.0,
            "cached_tokens": sum(one.stats.cached_tokens for one in ended),
            "step_seconds": percentiles(step.seconds for step in steps),
            **{name: times[name] for name in ("ttft", "tpot", "queue_delay")},
            **self.open_now(),
        }

    def open_now(self) -> dict[str, Any]:
        """Requests that are running and waiting, and cache_usage, the part of the cache's blocks
        that sequences hold; during a step they may be from before it or after it."""
        if self._batch is None:
            return {"running": 0, "waiting": 0, "cache_usage": 0.0}
        state = _state(self._batch)
        used, num_blocks = state.pop("used_blocks"), state.pop("num_blocks")
        return {**state, "cache_usage": used / num_blocks if num_blocks else 0.0}

    def save_trace(self, path: str | Path) -> None:
        """Writes steps, requests and counts as a trace that Perfetto and chrome://tracing show.

        Args:
            path: a .json file.
        """
        from llamatelemetry.inference.trace import trace

        events = trace(list(self.steps), list(self.requests))
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    # ---- For Turns ----

    def note_step(
        self, begin: float, end: float, batch: RunningBatch, handles: list[RequestHandle]
    ) -> None:
        """A step is over.

        Args:
            begin, end: of time.perf_counter.
            batch: whose step it was.
            handles: what its step gave.
        """
        plan, batch.plan = batch.plan, None
        if plan is not None and plan.pieces:
            drawn_before = [piece for piece in plan.pieces if piece.is_decode]
            step = StepStats(
                begin,
                end,
                plan.num_tokens - len(drawn_before),
                len(drawn_before) + plan.num_won,
                preemptions=self._preemptions + len(plan.preempted),
                drafted_tokens=plan.num_drafted,
                accepted_tokens=plan.num_accepted,
                **_state(batch),
            )
            self._preemptions = 0
            self.steps.append(step)
            for listener in self.listeners:
                listener(step)
            self._note_ends(handles)
        else:
            self._preemptions += 0 if plan is None else len(plan.preempted)
            self.note_ends(batch, handles)

    def note_ends(self, batch: RunningBatch, handles: list[RequestHandle]) -> None:
        """Remembers those of the requests that have ended without a forward: the last step's
        counts, which a trace shows until the next one, are then without them."""
        if self._note_ends(handles) and self.steps:
            self.steps[-1] = replace(self.steps[-1], **_state(batch))

    def _note_ends(self, handles: list[RequestHandle]) -> int:
        ended, now = [handle for handle in handles if handle.done()], time.perf_counter()
        for handle in ended:
            request = handle.request
            reason = request.finish_reason or "error"
            self.requests.append(EndedRequest(request.arrival, handle.stats, reason, now))
        return len(ended)


def _state(batch: RunningBatch) -> dict[str, int]:
    """What of StepStats is so after a step."""
    scheduler = batch.scheduler
    blocks = scheduler.blocks
    return {
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting) + len(batch.incoming),
        "used_blocks": blocks.num_blocks - blocks.num_available,
        "num_blocks": blocks.num_blocks,
    }
