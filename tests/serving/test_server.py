"""The server, as the openai package, curl-like clients and clients that misbehave use it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import time

import httpx
import pytest
from http_servers import served, tiny_engine

openai = pytest.importorskip("openai")


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="secret", max_retries=0) as made:
        yield made


@pytest.fixture
def http(server):
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=server, headers=headers, timeout=30) as made:
        yield made


ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def idle(http, seconds=10.0):
    end = time.monotonic() + seconds
    while (count := http.get("/health").json()["open_requests"]) and time.monotonic() < end:
        time.sleep(0.02)
    return count == 0


def test_a_chat_is_the_engines_text(client):
    answer = client.chat.completions.create(**ASK, max_tokens=12)
    want = tiny_engine().infer("hello", max_tokens=12, temperature=0.0).text
    assert answer.choices[0].message.content == want
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len("u:hello;a:")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_messages_go_through_the_template(client):
    system = {"role": "system", "content": "be"}
    answer = client.chat.completions.create(
        model="tiny", messages=[system, *ASK["messages"]], max_tokens=1, temperature=0
    )
    assert answer.usage.prompt_tokens == len("s:be;u:hello;a:")
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=1
    )
    assert answer.usage.prompt_tokens == len("u:hello;a:")


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = client.chat.completions.create(**ASK, max_tokens=9)
    chunks = list(
        client.chat.completions.create(
            **ASK, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 4
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 9


def test_several_choices_and_seeds(client):
    def ask(**more):
        answer = client.chat.completions.create(**ASK | {"temperature": 1.5}, max_tokens=8, **more)
        return [choice.message.content for choice in answer.choices]

    first = ask(n=3, seed=7)
    assert first == ask(n=3, seed=7)
    assert len(set(first)) == 3
    assert ask(seed=8) == first[1:2]


def test_streamed_choices(client):
    chunks = client.chat.completions.create(**ASK, max_tokens=5, n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts[0] == texts[1] != ""


def test_completions_take_text_ids_and_lists(client):
    def ask(prompt, **more):
        answer = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=6, **more
        )
        return [choice.text for choice in answer.choices], answer.usage.prompt_tokens

    ids = [ord(character) - 32 for character in "hello"]
    (text,), count = ask("hello")
    assert count == 5
    assert ask(ids) == ([text], 5)
    assert ask(["hello", "hello"]) == ([text, text], 10)
    assert ask([ids, ids], n=2) == ([text] * 4, 10)


def test_the_models_own_defaults_hold_where_a_request_says_nothing():
    generation = {"temperature": 0.0, "repetition_penalty": 1.5}
    engine = tiny_engine(generation)
    want = engine.infer("hello", max_tokens=12).text
    with served(engine=engine) as (address, _), httpx.Client(base_url=address) as http:
        body = {"messages": ASK["messages"], "max_tokens": 12}
        said = [
            http.post("/v1/chat/completions", json=body | more).json()["choices"][0]["message"]
            for more in ({}, {"temperature": 1.9, "seed": 3}, {"repetition_penalty": 1.0})
        ]
    assert said[0]["content"] == want
    assert len({message["content"] for message in said}) == 3


def test_a_truth_value_is_no_token(http):
    for prompt in ([True], [[5, True]]):
        answer = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
        assert answer.status_code == 400, answer.text
        assert "prompt" in answer.json()["error"]["message"]


def test_stop_strings(client):
    whole = client.completions.create(model="tiny", prompt="x", temperature=0, max_tokens=12)
    stop = whole.choices[0].text[3:5]
    answer = client.completions.create(
        model="tiny", prompt="x", temperature=0, max_tokens=12, stop=stop
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole.choices[0].text.partition(stop)[0]


def test_models_health_metrics_and_the_page(client, http):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert idle(http)
    client.chat.completions.create(**ASK, max_tokens=2)
    metrics = http.get("/metrics").text
    for name in ("time_to_first_token_seconds_count", "generation_tokens_total"):
        line = next(line for line in metrics.splitlines() if line.startswith(f"vllm:{name}"))
        assert float(line.split()[-1]) >= 1
    page = http.get("/")
    assert "<form>" in page.text
    assert page.headers["content-type"].startswith("text/html")


IMAGE = {"role": "user", "content": [{"type": "image_url"}]}
REFUSED = {
    "no body": (b"", "JSON"),
    "bad json": (b'{"messages": [', "JSON"),
    "a list": (b"[]", "object"),
    "no messages": ({"messages": []}, "messages"),
    "unknown field": (ASK | {"temprature": 1}, "temprature"),
    "unknown role": (ASK | {"messages": [{"role": "boss", "content": "x"}]}, "role"),
    "image": (
        ASK | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "image_url",
    ),
    "temperature": (ASK | {"temperature": -1}, "temperature"),
    "nan": (b'{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}', "top_p"),
    "max_tokens": (ASK | {"max_tokens": 0}, "max_tokens"),
    "empty stop": (ASK | {"stop": [""]}, "stop"),
    "logprobs": (ASK | {"logprobs": 3}, "logprobs"),
    "top_logprobs alone": (ASK | {"top_logprobs": 3}, "top_logprobs"),
    "penalty": (ASK | {"frequency_penalty": 2.5}, "frequency_penalty"),
    "bias": (ASK | {"logit_bias": {"5": 101}}, "logit_bias"),
    "a bias of no token": (ASK | {"logit_bias": {"999999": 1}}, "logit_bias"),
    "format": (ASK | {"response_format": {"type": "yaml"}}, "response_format"),
    "a format without a schema": (ASK | {"response_format": {"type": "json_schema"}}, "schema"),
    "two structures": (
        ASK | {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs",
    ),
    "tools": (ASK | {"tools": [{"type": "function"}]}, "tools"),
    "a model without tools": (
        ASK | {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "chat template",
    ),
    "tool_choice": (ASK | {"tool_choice": "required"}, "tool_choice"),
    "n and best_of": (ASK | {"best_of": 2}, "best_of"),
    "audio": (ASK | {"modalities": ["audio"]}, "modalities"),
    "an empty message": (ASK | {"messages": [{"role": "user", "content": None}]}, "content"),
    "too many choices": (ASK | {"n": 1000}, "n"),
    "past the context": (ASK | {"max_tokens": 10**6}, "context"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_sentences(http, name):
    body, word = REFUSED[name]
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = http.post("/v1/chat/completions", content=content)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"


def test_neutral_fields_are_taken(http):
    more = {"logprobs": False, "presence_penalty": 0, "user": "me", "tools": None, "seed": None}
    answer = http.post("/v1/chat/completions", json=ASK | {"max_tokens": 1} | more)
    assert answer.status_code == 200, answer.text


def test_keys_models_and_bodies(http, server):
    assert httpx.get(f"{server}/v1/models").status_code == 401
    assert http.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    unknown = http.post("/v1/chat/completions", json=ASK | {"model": "gpt"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    (served,) = http.get("/v1/models").json()["data"]
    assert http.get(f"/v1/models/{served['id']}").json() == served
    assert http.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{server}/v1/models/{served['id']}").status_code == 401
    assert http.get("/nothing").status_code == 404
    large = ASK | {"messages": [{"role": "user", "content": "x" * 30_000}]}
    assert http.post("/v1/chat/completions", json=large).status_code == 413
    chunked = http.post("/v1/chat/completions", content=(b"x" * 1000 for _ in range(40)))
    assert chunked.status_code == 413
    assert idle(http)


def test_back_pressure():
    long = ASK | {"max_tokens": 100, "n": 8}
    with (
        served(max_open=8, step_s=0.05) as (address, _),
        httpx.Client(base_url=address, timeout=30) as http,
    ):
        with http.stream("POST", "/v1/chat/completions", json=long | {"stream": True}) as stream:
            lines = stream.iter_lines()  # held: one that is collected closes the connection
            next(lines)
            busy = http.post("/v1/chat/completions", json=ASK | {"max_tokens": 1})
            assert busy.status_code == 429
            assert int(busy.headers["retry-after"]) >= 1
            assert busy.json()["error"]["type"] == "rate_limit_error"
        assert idle(http)
        assert http.post("/v1/chat/completions", json=ASK | {"max_tokens": 1}).status_code == 200


def test_clients_that_vanish_cost_nothing(http, server):
    host, port = server.removeprefix("http://").split(":")
    body = json.dumps(ASK | {"max_tokens": 100, "stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    for i in range(200):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as one:
            one.sendall(head + body[: len(body) if i % 3 else len(body) // 2])
            if i % 3 == 1:
                one.recv(1)
    assert idle(http, 30)
    whole = http.post("/v1/chat/completions", json=ASK | {"max_tokens": 3})
    assert whole.status_code == 200


def test_many_at_once_give_what_each_gives_alone(client):
    def ask(word):
        message = [{"role": "user", "content": word}]
        answer = client.chat.completions.create(
            model="tiny", messages=message, max_tokens=10, temperature=0
        )
        return answer.choices[0].message.content

    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    alone = [ask(word) for word in words]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, words)) == alone


def test_a_request_that_takes_too_long_is_cancelled():
    with served(timeout_s=0.05) as (address, _), httpx.Client(base_url=address) as http:
        late = http.post("/v1/chat/completions", json=ASK | {"max_tokens": 110, "n": 16})
        assert late.status_code == 504
        assert idle(http)


def test_shutdown_waits_for_open_requests():
    with served() as (address, server), httpx.Client(base_url=address, timeout=30) as http:
        body = ASK | {"max_tokens": 60, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.should_exit = True
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
