"""What the server counts, under the names that vLLM's dashboards know where it has them."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.telemetry import StepStats, Telemetry

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """Counters and histograms of one server, in a registry of their own.

    Args:
        model: the served name.
        num_open: how many requests are open.
        telemetry: of the batcher.
    """

    def __init__(self, model: str, num_open: Callable[[], int], telemetry: Telemetry) -> None:
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
        self._prefill = histogram("request_prefill_time_seconds", "To the first token", _SECONDS)
        self._decode = histogram("request_decode_time_seconds", "After the first token", _SECONDS)
        self._inference = histogram("request_inference_time_seconds", "Without queue", _SECONDS)
        self._prompts = histogram("request_prompt_tokens", "Tokens of prompts", _TOKENS)
        self._drawns = histogram("request_generation_tokens", "Tokens of answers", _TOKENS)
        iteration = histogram("iteration_tokens_total", "Tokens of a step", _TOKENS)
        drafted = counter("spec_decode_num_draft_tokens", "Drafted tokens")
        accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were right")

        def note(step: StepStats) -> None:
            iteration.observe(step.prompt_tokens + step.decode_tokens)
            drafted.inc(step.drafted_tokens)
            accepted.inc(step.accepted_tokens)

        telemetry.listeners.append(note)
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked for in the cache")
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

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            made = Gauge(f"vllm:{name}", text, ["model_name"], registry=registry)
            made.labels(model).set_function(value)

        def running() -> int:
            return min(int(telemetry.open_now()["running"]), num_open())

        def usage() -> float:
            return float(telemetry.open_now()["cache_usage"])

        gauge("num_requests_running", "At work", running)
        gauge("num_requests_waiting", "In the queue", lambda: num_open() - running())
        gauge("kv_cache_usage_perc", "Blocks in use, 1 is all", usage)

    def ended(self, handle: RequestHandle) -> None:
        """Counts a request that has ended, or was cancelled and ends before the next step."""
        stats, reason = handle.stats, handle.request.finish_reason
        if handle.error is not None:
            reason = "error"
        elif reason in (None, "cancelled"):
            reason = "abort"  # vLLM's word
        self._ended.labels(self._model, reason).inc()
        self._prompt.inc(len(handle.request.prompt))
        self._drawn.inc(stats.num_tokens)
        self._cached.inc(stats.cached_tokens)
        if handle.request.num_cached is not None:
            self._queries.inc(len(handle.request.prompt))
        self._prompts.observe(len(handle.request.prompt))
        self._drawns.observe(stats.num_tokens)
        self._preempted.inc(stats.preemptions)
        for metric, seconds in (
            (self._queue, stats.started - stats.enqueued),
            (self._ttft, stats.first_token - stats.enqueued),
            (self._prefill, stats.first_token - stats.started),
            (self._decode, stats.last_token - stats.first_token),
            (self._inference, stats.last_token - stats.started),
            (self._whole, stats.last_token - stats.enqueued),
            (self._tpot, (stats.last_token - stats.first_token) / max(stats.num_tokens - 1, 1)),
        ):
            if not math.isnan(seconds) and (metric is not self._tpot or stats.num_tokens > 1):
                metric.observe(seconds)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return bytes(generate_latest(self._registry))
