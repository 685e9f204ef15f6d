"""Errors that clients tell apart by their codes, whole and streamed."""

from __future__ import annotations

import json

import httpx
import torch
from fastapi.testclient import TestClient
from http_servers import served, tiny_engine

from llamatelemetry.inference.block_manager import OutOfBlocks
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.plan_runner import PlanRunner
from llamatelemetry.serving.app import ServerConfig, create_app


def test_errors_have_codes(monkeypatch):
    with served() as (address, _), httpx.Client(base_url=address, timeout=30) as http:
        check(http, monkeypatch)


def check(http, monkeypatch):
    over = http.post("/v1/completions", json={"prompt": "x" * 200, "max_tokens": 1})
    assert (over.status_code, over.json()["error"]["code"]) == (400, "context_length_exceeded")
    for error, code in (
        (OutOfBlocks("Out of KV cache memory: 3 of 2"), "out_of_kv_cache"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
    ):
        monkeypatch.setattr(
            PlanRunner, "run", lambda self, plan, e=error: [(p, e) for p in plan.pieces]
        )
        short = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert (short.status_code, short.json()["error"]["code"]) == (503, code)
        assert short.json()["error"]["message"] == str(error)
        with http.stream(
            "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True}
        ) as stream:
            (told,) = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert json.loads(told[6:])["error"]["code"] == code


def test_what_never_fits_is_refused_for_good():
    batcher = ContinuousBatching(4, tiny_engine(), num_blocks=1)
    app = create_app(batcher, ServerConfig("tiny"), None)
    with TestClient(app, raise_server_exceptions=False) as http:
        answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 100})
        assert answer.status_code == 400
        assert "retry-after" not in answer.headers
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "out_of_kv_cache")
        short = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        assert short.status_code == 200
