"""OpenTelemetry spans and metrics of a server, in the SDK's in-memory exporters; and /metrics."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
from http_servers import served

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llamatelemetry.inference.plan_runner import PlanRunner
from llamatelemetry.serving.otel import OpenTelemetry

ASK = {"prompt": "hello", "max_tokens": 6, "temperature": 0, "seed": 4}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def exported():
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    otel = OpenTelemetry("tiny", tracers, MeterProvider([reader]))
    with served(otel=otel) as (address, _), httpx.Client(base_url=address, timeout=30) as http:
        yield http, spans, reader


def points_of(reader):
    """Metric -> how many values, their sum, and the attributes of one."""
    found = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                points = metric.data.data_points
                count = sum(point.count for point in points)
                found[metric.name] = (count, sum(p.sum for p in points), points[0].attributes)
    return found


def ended_by(http):
    """Reason -> how many requests ended for it, as /metrics says."""
    found = {}
    for line in http.get("/metrics").text.splitlines():
        if line.startswith("vllm:request_success_total{"):
            labels, _, count = line.rpartition(" ")
            found[labels.partition('finished_reason="')[2].partition('"')[0]] = int(float(count))
    return found


def test_an_answer_is_a_span_and_values(exported):
    http, spans, reader = exported
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    http.post("/v1/completions", json=ASK | {"n": 2}, headers=headers).raise_for_status()
    (span,) = spans.get_finished_spans()
    assert span.name == "text_completion tiny"
    assert f"{span.context.trace_id:x}" == TRACE
    said = span.attributes
    assert said["gen_ai.request.model"] == "tiny"
    assert said["gen_ai.request.max_tokens"] == 6
    assert said["gen_ai.request.seed"] == 4
    assert said["gen_ai.usage.input_tokens"] == len("hello")
    assert said["gen_ai.usage.output_tokens"] == 12
    assert said["gen_ai.response.finish_reasons"] == ("length", "length")
    (first,) = span.events
    assert span.start_time < first.timestamp < span.end_time
    found = points_of(reader)
    assert {name: count for name, (count, _, _) in found.items()} == {
        "gen_ai.server.request.duration": 1,
        "gen_ai.server.time_to_first_token": 2,
        "gen_ai.server.time_per_output_token": 2,
    }
    _, seconds, attributes = found["gen_ai.server.request.duration"]
    assert seconds == pytest.approx((span.end_time - span.start_time) / 1e9, abs=0.05)
    assert attributes["gen_ai.operation.name"] == "text_completion"


def test_every_prompt_of_a_list_is_counted_once(exported):
    http, spans, _ = exported
    ask = ASK | {"prompt": ["hello", "you"], "n": 2}
    http.post("/v1/completions", json=ask).raise_for_status()
    (span,) = spans.get_finished_spans()
    assert span.attributes["gen_ai.usage.input_tokens"] == len("helloyou")
    assert span.attributes["gen_ai.usage.output_tokens"] == 24


def test_streams_and_errors_too(exported, monkeypatch):
    http, spans, _ = exported
    messages = [{"role": "user", "content": "hello"}]
    http.post("/v1/chat/completions", json={"messages": messages, "stream": True, "max_tokens": 3})

    def fails(self, plan):
        for piece in plan.pieces:
            yield piece, RuntimeError("poison")

    monkeypatch.setattr(PlanRunner, "run", fails)
    assert http.post("/v1/completions", json=ASK).status_code == 500
    assert ended_by(http) == {"length": 1, "error": 1}
    chat, bad = spans.get_finished_spans()
    assert chat.name == "chat tiny"
    assert chat.attributes["gen_ai.usage.output_tokens"] == 3
    assert bad.attributes["error.type"] == "RuntimeError"
    assert not bad.status.is_ok
    assert "poison" in bad.status.description


def test_metrics_have_vllms_names(exported):
    http, _, _ = exported
    http.post("/v1/completions", json=ASK).raise_for_status()
    lines = dict(
        line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#"
    )
    at = {name.partition("{")[0].removeprefix("vllm:"): float(v) for name, v in lines.items()}
    for name in (
        "time_to_first_token_seconds_count",
        "time_per_output_token_seconds_count",
        "request_queue_time_seconds_count",
        "request_prefill_time_seconds_count",
        "request_decode_time_seconds_count",
        "request_inference_time_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_success_total",
    ):
        assert at[name] == 1, name
    assert at["request_prompt_tokens_sum"] == at["prompt_tokens_total"] == 5
    assert at["request_generation_tokens_sum"] == at["generation_tokens_total"] == 6
    assert at["prefix_cache_queries_total"] == 5
    assert at["iteration_tokens_total_sum"] == 5 + 5
    assert at["num_requests_running"] == at["num_requests_waiting"] == 0
    assert at["kv_cache_usage_perc"] == 0


def test_it_is_refused_where_the_api_is_absent():
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from llamatelemetry.cli.serve import _otel\n"
        "_otel('x')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "--otel needs opentelemetry, which is not installed" in run.stderr
    assert "install what it needs with: pip install" in run.stderr
