"""Steps and requests as trace events, in the format of chrome://tracing and Perfetto.

Source: the Trace Event Format of Chromium's catapult.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamatelemetry.inference.telemetry import EndedRequest, StepStats

_STEPS, _REQUESTS = 1, 2  # processes of the trace


def trace(steps: Sequence[StepStats], requests: Sequence[EndedRequest]) -> list[dict[str, Any]]:
    """Trace events; times are in microseconds of time.perf_counter.

    Args:
        steps: each becomes a slice, with counters of requests, tokens and blocks.
        requests: each becomes a row with slices for its queue, prefill and decode.
    """
    events = [_name(_STEPS, "steps"), _name(_REQUESTS, "requests")]
    for step in steps:
        events += _of_step(step)
    for row, request in enumerate(requests):
        events += _of_request(row, request)
    return events


def _of_step(step: StepStats) -> Iterator[dict[str, Any]]:
    kinds = {"prefill": step.prompt_tokens, "decode": step.decode_tokens}
    yield {
        "name": "+".join(name for name, count in kinds.items() if count),
        "args": kinds
        | {
            "preemptions": step.preemptions,
            "drafted": step.drafted_tokens,
            "accepted": step.accepted_tokens,
        },
        **_slice(_STEPS, 0, step.begin, step.end),
    }
    counters = {
        "requests": {"running": step.running, "waiting": step.waiting},
        "tokens": kinds,
        "blocks": {"used": step.used_blocks},
    }
    for name, values in counters.items():
        yield {"name": name, "ph": "C", "pid": _STEPS, "ts": _us(step.begin), "args": values}


def _of_request(row: int, request: EndedRequest) -> Iterator[dict[str, Any]]:
    stats = request.stats
    parts = {
        "queue": (stats.enqueued, stats.started),
        "prefill": (stats.started, stats.first_token),
        "decode": (stats.first_token, stats.last_token),
    }
    said = {
        "request": request.number,
        "prompt_tokens": stats.num_prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "tokens": stats.num_tokens,
        "preemptions": stats.preemptions,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "finish_reason": request.reason,
    }
    for name, (begin, end) in parts.items():
        if not math.isnan(begin + end):
            yield {"name": name, "args": said, **_slice(_REQUESTS, row, begin, end)}


def _slice(process: int, row: int, begin: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "pid": process, "tid": row, "ts": _us(begin), "dur": _us(end - begin)}


def _name(process: int, name: str) -> dict[str, Any]:
    return {"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
