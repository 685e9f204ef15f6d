"""/v1/embeddings, as the openai package and others ask for them."""

from __future__ import annotations

import base64
import math
import struct

import httpx
import pytest
import torch
from families import tiny_model
from http_servers import served, tiny_engine

from llamatelemetry.inference.embedding import Embedder, groups

openai = pytest.importorskip("openai")


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="secret", max_retries=0) as made:
        yield made


def post(server, **body):
    headers = {"Authorization": "Bearer secret"}
    return httpx.post(f"{server}/v1/embeddings", json=body, headers=headers, timeout=30)


def ids_of(text):
    return [ord(character) - 32 for character in text]


def assert_near(ours, wanted):
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_the_plain_models(family, pooling):
    model = tiny_model(family)
    rows = [[5, 9, 2], list(range(3, 40)), [7]]
    ours = Embedder(model, pooling).embed(rows)
    for row, vector in zip(rows, ours, strict=True):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([row])).last_hidden_state[0].double()
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert_near(vector, (pooled / pooled.norm()).tolist())


def test_groups_hold_rows_of_like_lengths_within_the_limit():
    rows = [[0] * n for n in (30, 1, 2, 50, 9, 8)]
    found = list(groups(rows, 20))
    assert sorted(i for group in found for i in group) == list(range(6))
    assert [[len(rows[i]) for i in group] for group in found] == [[1, 2], [8, 9], [30], [50]]


def test_the_client_gets_vectors_of_texts_and_ids(client):
    texts = ["hello", "a longer text of more tokens", "x"]
    want = Embedder(tiny_engine().loaded.model).embed([ids_of(text) for text in texts])
    answer = client.embeddings.create(model="tiny", input=texts)  # base64, decoded by the client
    assert [one.index for one in answer.data] == [0, 1, 2]
    for one, vector in zip(answer.data, want, strict=True):
        assert_near(one.embedding, vector)
        assert math.isclose(sum(x * x for x in one.embedding), 1, rel_tol=1e-4)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))
    numbers = client.embeddings.create(model="tiny", input="hello", encoding_format="float")
    assert_near(numbers.data[0].embedding, want[0])
    ids = client.embeddings.create(
        model="tiny", input=[ids_of(text) for text in texts], dimensions=len(want[0])
    )
    for one, vector in zip(ids.data, want, strict=True):
        assert_near(one.embedding, vector)


def test_base64_is_little_endian_float32(server):
    whole = post(server, input="hello").json()["data"][0]["embedding"]
    coded = post(server, input=ids_of("hello"), encoding_format="base64").json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert_near(struct.unpack(f"<{len(whole)}f", raw), whole)


REFUSED = {
    "nothing": ({}, "input"),
    "empty": ({"input": ""}, "input"),
    "an empty one": ({"input": ["a", ""]}, "input"),
    "no ids": ({"input": []}, "input"),
    "past the context": ({"input": "x" * 129}, "128"),
    "no token": ({"input": [5, 97]}, "[0, 97)"),
    "a truth value": ({"input": [True]}, "input"),
    "truth values": ({"input": [[5, False]]}, "input"),
    "cut": ({"input": "a", "dimensions": 7}, "dimensions must be the model's 288"),
    "format": ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    "unknown field": ({"input": "a", "truncate": 5}, "truncate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_sentences(server, name):
    body, word = REFUSED[name]
    answer = post(server, **body)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


def test_another_model_and_no_key(server):
    assert post(server, input="a", model="gpt").status_code == 404
    assert httpx.post(f"{server}/v1/embeddings", json={"input": "a"}).status_code == 401


def test_vectors_come_between_the_steps_of_a_generation():
    body = {"prompt": "hello", "max_tokens": 100, "stream": True, "temperature": 0}
    with (
        served(step_s=0.02, max_open=2, pooling="last") as (address, _),
        httpx.Client(base_url=address, timeout=30) as http,
        http.stream("POST", "/v1/completions", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        answer = http.post("/v1/embeddings", json={"input": ["one", "two"]})
        assert answer.status_code == 200, answer.text
        want = Embedder(tiny_engine().loaded.model, "last").embed([ids_of("one"), ids_of("two")])
        assert_near([one["embedding"] for one in answer.json()["data"]], want)
        assert http.get("/health").json()["open_requests"] == 1
        assert sum(line.startswith("data: ") for line in lines) > 50


def test_a_model_that_fails_is_one_answers_error(monkeypatch):
    embed = Embedder.embed

    def fails(self, rows):
        if any(row == ids_of("bad") for row in rows):
            raise RuntimeError("poison")
        return embed(self, rows)

    monkeypatch.setattr(Embedder, "embed", fails)
    with served() as (address, _), httpx.Client(base_url=address) as http:
        bad = http.post("/v1/embeddings", json={"input": "bad"})
        assert bad.status_code == 500
        assert "poison" in bad.json()["error"]["message"]
        assert http.post("/v1/embeddings", json={"input": "good"}).status_code == 200
        assert http.get("/health").json() == {"status": "ok", "open_requests": 0}
