"""disable_spec_decode over HTTP."""

from __future__ import annotations

import httpx
import pytest
from http_servers import served, tiny_engine

from llamatelemetry.inference.speculation_config import SpeculationConfig


def drafted(address):
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    name = "vllm:spec_decode_num_draft_tokens_total"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_request_may_have_nothing_drafted(route):
    engine = tiny_engine()
    speculation = SpeculationConfig(prompt_lookup_min=1, adaptive=False)
    ask = {"max_tokens": 24, "temperature": 0}
    ask |= (
        {"prompt": "hello hello hello"}
        if route == "completions"
        else {"messages": [{"role": "user", "content": "hello hello hello"}]}
    )
    with served(engine, speculation=speculation) as (address, _):
        texts, counts = [], []
        for fields in ({"disable_spec_decode": True}, {}, {"disable_spec_decode": False}):
            answer = httpx.post(f"{address}/v1/{route}", json=ask | fields, timeout=60)
            choice = answer.json()["choices"][0]
            texts.append(choice.get("text") or choice["message"]["content"])
            counts.append(drafted(address))
        wrong = httpx.post(f"{address}/v1/{route}", json=ask | {"disable_spec_decode": 7})
    assert counts[0] == 0 < counts[1] < counts[2]
    assert len(set(texts)) == 1
    assert wrong.status_code == 400
    assert "disable_spec_decode" in wrong.json()["error"]["message"]
