"""What the server counts, under the names that vLLM's dashboards know where it has them."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llamatelemetry.inference.request_handle import RequestHandle

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self, model: str, num_open: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._model = model

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"vllm:{name}", text, ["model_name"], registry=registry, buckets=buckets
            )
            return made.labels(model)

        def counter(name: str, text: str) -> Counter:
            made = Counter(f"vllm:{name}", text, ["model_name"], registry=registry)
            return made.labels(model)

        self._ttft = histogram("time_to_first_token_seconds", "Time to first token", _SECONDS)
        self._tpot = histogram("time_per_output_token_seconds", "Per output token", _STEP_SECONDS)
        self._queue = histogram("request_queue_time_seconds", "Before the prefill", _SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "Whole requests", _SECONDS)
        self._prompt = counter("prompt_tokens", "Prompt tokens")
        self._drawn = counter("generation_tokens", "Generated tokens")
        self._cached = counter("prefix_cache_hits", "Prompt tokens that the cache held already")
        self._preempted = counter("num_preemptions", "Requests that gave their blocks up")
        self._ended = Counter(
            "vllm:request_success",
            "Ended requests",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        opened = Gauge("vllm:num_requests_running", "Open", ["model_name"], registry=registry)
        opened.labels(model).set_function(num_open)

    def ended(self, handle: RequestHandle) -> None:
        """Counts a request that has ended."""
        stats = handle.stats
        self._ended.labels(self._model, handle.request.finish_reason or "error").inc()
        self._prompt.inc(len(handle.request.prompt))
        self._drawn.inc(stats.num_tokens)
        self._cached.inc(stats.cached_tokens)
        self._preempted.inc(stats.preemptions)
        for metric, seconds in (
            (self._queue, stats.started - stats.enqueued),
            (self._ttft, stats.first_token - stats.enqueued),
            (self._whole, stats.last_token - stats.enqueued),
            (self._tpot, (stats.last_token - stats.first_token) / max(stats.num_tokens - 1, 1)),
        ):
            if not math.isnan(seconds) and (metric is not self._tpot or stats.num_tokens > 1):
                metric.observe(seconds)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return bytes(generate_latest(self._registry))
