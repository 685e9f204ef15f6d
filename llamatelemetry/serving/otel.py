"""OpenTelemetry: a span for each answer, and the server metrics of its conventions for GenAI.

Needs opentelemetry-api alone; without an SDK in the process its calls do nothing.

Source: OpenTelemetry's semantic conventions for generative AI, spans and metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import metrics, propagate, trace

from llamatelemetry.inference.request_handle import RequestHandle

_NAME = "llamatelemetry"
# Bounds that the conventions advise, in seconds.
_DURATIONS = tuple(0.01 * 2**i for i in range(14))
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class OpenTelemetry:
    """Tells a tracer and a meter of answers.

    Args:
        model: the served name.
        tracers, meters: providers; None is the process' own.
    """

    def __init__(self, model: str, tracers: Any = None, meters: Any = None) -> None:
        self._model = model
        self._tracer = trace.get_tracer(_NAME, tracer_provider=tracers)
        meter = metrics.get_meter(_NAME, meter_provider=meters)

        def seconds(name: str, text: str, bounds: Sequence[float]) -> Any:
            return meter.create_histogram(
                f"gen_ai.server.{name}",
                unit="s",
                description=text,
                explicit_bucket_boundaries_advisory=bounds,
            )

        self._duration = seconds("request.duration", "Of an answer", _DURATIONS)
        self._ttft = seconds("time_to_first_token", "From the request's arrival", _TTFT)
        self._tpot = seconds("time_per_output_token", "After the first one", _TPOT)

    def answered(
        self,
        operation: str,
        handles: Sequence[RequestHandle],
        usage: Mapping[str, Any],
        asked: Mapping[str, Any],
        headers: Mapping[str, str],
    ) -> None:
        """An answer is over, in whatever way.

        Args:
            operation: "chat" or "text_completion".
            handles: of its choices.
            usage: prompt_tokens and completion_tokens of all of it.
            asked: what of the request the conventions have names for, without gen_ai.request.
            headers: of the request: where they carry a trace, the span is part of it.
        """
        now, first = time.perf_counter(), handles[0]
        begin = first.stats.enqueued
        named = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": _NAME,
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
        }
        error = next((one.error for one in handles if one.error is not None), None)
        if error is not None:
            named["error.type"] = type(error).__name__
        reasons = [str(one.request.finish_reason or "cancelled") for one in handles]
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=propagate.extract(dict(headers)),
            kind=trace.SpanKind.SERVER,
            start_time=_wall_ns(begin, now),
            attributes={
                **named,
                **{f"gen_ai.request.{name}": v for name, v in asked.items() if v is not None},
                "gen_ai.response.finish_reasons": reasons,
                "gen_ai.usage.input_tokens": usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": usage["completion_tokens"],
            },
        )
        if not math.isnan(first.stats.first_token):
            moment = _wall_ns(first.stats.first_token, now)
            span.add_event("first token", timestamp=moment)
        if error is not None:
            span.record_exception(error)
            span.set_status(trace.StatusCode.ERROR, str(error))
        span.end(_wall_ns(now, now))
        self._duration.record(now - begin, named)
        for handle in handles:
            for metric, value in ((self._ttft, handle.stats.ttft), (self._tpot, handle.stats.tpot)):
                if not math.isnan(value):
                    metric.record(value, named)


def _wall_ns(moment: float, now: float) -> int:
    """A time of perf_counter on the clock of spans, nanoseconds since the epoch."""
    return time.time_ns() - int((now - moment) * 1e9)
