"""Penalties, biases, log-probabilities, best_of and forms of the text, by the openai package."""

from __future__ import annotations

import json
import math
import re
import sys

import httpx
import pytest
from http_servers import served, tiny_engine

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.sampling import GREEDY, SamplingParams

openai = pytest.importorskip("openai")
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
TEXT = {"model": "tiny", "prompt": "hello", "temperature": 0}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="secret", max_retries=0) as made:
        yield made


def engine_text(options, count=12, params=GREEDY):
    batcher = ContinuousBatching(2, tiny_engine())
    ids = [ord(character) - 32 for character in "hello"]
    return batcher.submit(ids, params, count, logits=options).result()


def test_penalties_and_biases(client):
    for fields in (
        {"presence_penalty": 1.5},
        {"frequency_penalty": 2.0},
        {"logit_bias": {"40": 100}},
    ):
        answer = client.completions.create(**TEXT, max_tokens=12, **fields)
        bias = {int(token): value for token, value in fields.get("logit_bias", {}).items()}
        want = engine_text(LogitOptions(**fields | ({"logit_bias": bias} if bias else {})))
        assert answer.choices[0].text == want.text
    plain = client.completions.create(**TEXT, max_tokens=12).choices[0].text
    assert answer.choices[0].text == "H" * 12 != plain


def test_logprobs_of_a_chat(client):
    ask = ASK | {"max_tokens": 7, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**ask).choices[0]
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert len(entry.top_logprobs) == 3
        assert sum(math.exp(one.logprob) for one in entry.top_logprobs) <= 1
    chunks = list(client.chat.completions.create(**ask, stream=True))
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries
    bare = client.chat.completions.create(**ASK, max_tokens=2, logprobs=True).choices[0]
    assert [entry.top_logprobs for entry in bare.logprobs.content] == [[], []]
    assert client.chat.completions.create(**ASK, max_tokens=2).choices[0].logprobs is None


def test_logprobs_of_a_completion(client):
    choice = client.completions.create(**TEXT, max_tokens=6, logprobs=2).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == list(range(6))
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert len(top) == 2
        assert top[token] == logprob
    chunks = list(client.completions.create(**TEXT, max_tokens=6, logprobs=2, stream=True))
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for one in told for token in one.tokens] == found.tokens
    assert [offset for one in told for offset in one.text_offset] == found.text_offset


def test_best_of(client):
    ask = {"model": "tiny", "prompt": "hello", "temperature": 1.0, "seed": 4, "max_tokens": 5}
    answer = client.completions.create(**ask, best_of=5, n=2, logprobs=0)
    means = []
    for seed in range(4, 9):
        params = SamplingParams(temperature=1.0, seed=seed)
        one = engine_text(LogitOptions(logprobs=0), 5, params)
        means.append((sum(entry.logprob for entry in one.logprobs), one.text))
    wanted = [text for _, text in sorted(means, reverse=True)[:2]]
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage.completion_tokens == 25
    assert answer.usage.prompt_tokens == 5
    with pytest.raises(openai.BadRequestError, match="best_of must be at least n"):
        client.completions.create(**ask, best_of=1, n=2)
    with pytest.raises(openai.BadRequestError, match="best_of must be n with stream"):
        client.completions.create(**ask, best_of=3, stream=True)


def test_vllms_fields(client):
    text = client.completions.create(**TEXT, max_tokens=12).choices[0].text
    end = ord(text[3]) - 32
    first = text.index(text[3])
    cut = client.completions.create(
        **TEXT, max_tokens=12, extra_body={"stop_token_ids": [end], "priority": 3}
    ).choices[0]
    assert (cut.finish_reason, cut.text) == ("stop", text[: first + 1])
    late = client.completions.create(
        **TEXT, max_tokens=12, extra_body={"stop_token_ids": [end], "min_tokens": 12}
    ).choices[0]
    assert text[3] not in late.text[:11]
    assert len(late.text) == 12


def test_forms_of_the_text(client):
    pytest.importorskip("xgrammar")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    ask = ASK | {"temperature": 1.0, "seed": 2, "max_tokens": 100}
    answer = client.chat.completions.create(**ask, n=3, response_format=form)
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content)) == {"ok"}
        assert choice.message.content.startswith("{")
    any_object = client.chat.completions.create(**ask, response_format={"type": "json_object"})
    assert any_object.choices[0].message.content.startswith("{")
    for outputs, pattern in (
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": "[ab]{4}"}, "[ab]{4}"),
        ({"grammar": 'root ::= "(" [0-9] ")"'}, r"\([0-9]\)"),
        ({"json": {"const": 7}}, "7"),
    ):
        stream = client.chat.completions.create(
            **ask, stream=True, extra_body={"structured_outputs": outputs}
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert re.fullmatch(pattern, "".join(pieces))
    with pytest.raises(openai.BadRequestError, match="regex: "):
        client.chat.completions.create(**ask, extra_body={"structured_outputs": {"regex": "("}})
    with pytest.raises(openai.BadRequestError, match="min_tokens must be left out"):
        client.chat.completions.create(**ask, response_format=form, extra_body={"min_tokens": 3})


def test_without_xgrammar_a_form_is_refused(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with served() as (address, _):
        body = ASK | {"response_format": {"type": "json_object"}}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "xgrammar" in answer.json()["error"]["message"]
