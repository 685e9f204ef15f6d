"""use_beam_search and length_penalty, as vLLM's clients send them."""

from __future__ import annotations

import json

import httpx
import pytest
import torch
from http_servers import served, tiny_engine

from llamatelemetry.inference.continuous import ContinuousBatching

ASK = {"prompt": "hello", "max_tokens": 9, "use_beam_search": True}
IDS = [ord(character) - 32 for character in "hello"]


def post(server, ask, route="completions"):
    headers = {"Authorization": "Bearer secret"}
    return httpx.post(f"{server}/v1/{route}", json=ask, headers=headers, timeout=60)


def texts(server, ask):
    return [one["text"] for one in post(server, ask).raise_for_status().json()["choices"]]


def test_choices_are_the_best_of_the_beams(server):
    engine = tiny_engine()
    model = engine.loaded.model
    with torch.no_grad():
        rows = model.generate(
            torch.tensor([IDS]),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=9,
            do_sample=False,
            length_penalty=0.5,
        )
    wanted = [engine.tokenizer.decode(row) for row in rows[:, len(IDS) :].tolist()]
    assert texts(server, ASK | {"n": 3, "length_penalty": 0.5}) == wanted
    assert texts(server, ASK | {"n": 2, "best_of": 3, "length_penalty": 0.5}) == wanted[:2]
    greedy = ContinuousBatching(1, tiny_engine()).submit(IDS, max_tokens=9).result().text
    free = {"response_format": {"type": "text"}, "length_penalty": 2}
    assert texts(server, ASK) == texts(server, ASK | free) == [greedy]
    lines = post(server, ASK | {"n": 3, "length_penalty": 0.5, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed = ["", "", ""]
    for choice in (one for chunk in chunks for one in chunk["choices"]):
        streamed[choice["index"]] += choice["text"]
    assert streamed == wanted
    usage = post(server, ASK | {"n": 2}).json()["usage"]
    assert usage["completion_tokens"] == 18


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": 0.5}, "temperature must be left out with use_beam_search, got 0.5"),
        ({"logprobs": 2}, "logprobs must be left out with use_beam_search, got 2"),
        ({"logprobs": 0}, "logprobs must be left out with use_beam_search, got 0"),
        ({"stop": "x"}, "stop must be left out with use_beam_search, got 'x'"),
        (
            {"structured_outputs": {"json": {"type": "null"}}},
            "structured_outputs must be left out with use_beam_search, got {'json': {'type'",
        ),
        (
            {"n": 8},
            "n must be at most 4, the server's --max-batch-size, with use_beam_search, got 8",
        ),
        ({"best_of": 8}, "best_of must be at most 4, the server's --max-batch-size, with use"),
        ({"length_penalty": 31}, "length_penalty: Input should be less than or equal to 30"),
        ({"echo": 0}, "echo is not supported by this server, got 0"),
        ({"use_beam_search": False, "length_penalty": 2}, "must come with use_beam_search"),
    ],
)
def test_refusals(server, wrong, words):
    answer = post(server, ASK | {"n": 2} | wrong)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(("blocks", "n"), [(1, 1), (2, 2)])
def test_a_cache_without_room_for_the_default(blocks, n):
    """A chat that names no limit gets what the cache can hold, of beams what is left to each."""
    ask = {"messages": [{"role": "user", "content": "hello"}], "use_beam_search": True, "n": n}
    with (
        served(num_blocks=blocks) as (address, _),
        httpx.Client(base_url=address, timeout=60) as http,
    ):
        (model,) = http.get("/v1/models").json()["data"]
        assert model["max_model_len"] == blocks * 64
        usage = http.post("/v1/chat/completions", json=ask).raise_for_status().json()["usage"]
        assert usage["completion_tokens"] == n * (64 - usage["prompt_tokens"])
        answer = http.post("/v1/completions", json=ASK | {"n": 2, "max_tokens": 61})
        assert "in each of 2 beams need 4 blocks" in answer.json()["error"]["message"]
