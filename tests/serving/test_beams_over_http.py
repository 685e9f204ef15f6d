"""use_beam_search and length_penalty, as vLLM's clients send them."""

from __future__ import annotations

import json

import httpx
import pytest
import torch
from http_servers import tiny_engine

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
    assert texts(server, ASK) == [greedy]
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
        ({"stop": "x"}, "stop must be left out with use_beam_search"),
        ({"logprobs": 2}, "logprobs must be left out with use_beam_search, got 2"),
        ({"n": 8}, "num_beams must be at most max_batch_size (4)"),
        ({"use_beam_search": False, "length_penalty": 2}, "must come with use_beam_search"),
    ],
)
def test_refusals(server, wrong, words):
    answer = post(server, ASK | {"n": 2} | wrong)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
