"""Refusals over HTTP name fields that clients send, never Python's arguments."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient
from http_servers import tiny_engine

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.serving.app import ServerConfig, create_app
from llamatelemetry.serving.embeddings import EmbeddingRequest
from llamatelemetry.serving.protocol import ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
TEXT = {"prompt": "hello", "max_tokens": 9}
BEAMS = {"use_beam_search": True, "n": 2, "max_tokens": 2}
ROUTES = {
    "chat/completions": (ChatRequest, CHAT),
    "completions": (CompletionRequest, TEXT),
    "embeddings": (EmbeddingRequest, {"input": "hello"}),
}
WRONG = ("", "?", -1, -(10**40), 10**40, 0.5, 1e308, [], [1], ["?", ""], [[]], {}, {"?": 1}, True)
NUMBERS = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "length_penalty", "max_tokens", "seed", "n"),
)
ARGUMENTS = re.compile(
    r"num_beams|SamplingParams|LogitOptions|stop_sequences|logits|ContinuousBatching|params|"
    r"engine|max_batch_size\b(?!,)|json_schema:|json_$|schema_"
)


@pytest.fixture(scope="module")
def http():
    app = create_app(ContinuousBatching(4, tiny_engine()), ServerConfig("tiny", max_open=20))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    ("route", "field"),
    [(route, field) for route, (kind, _) in ROUTES.items() for field in kind.model_fields],
)
def test_every_field_of_every_route(http, route, field):
    """Of wrong values each is refused by the field's own name, or nothing is wrong with it."""
    refused = 0
    for value in WRONG:
        answer = http.post(f"/v1/{route}", json=ROUTES[route][1] | {field: value})
        if answer.status_code == 200:
            continue
        refused += 1
        error = answer.json()["error"]
        assert answer.status_code in (400, 404), (value, error)
        assert field in error["message"], (value, error)
        assert not ARGUMENTS.search(error["message"]), (value, error)
    assert refused > 3 or field == "user"


@pytest.mark.parametrize(
    ("route", "wrong", "words"),
    [
        (
            "completions",
            BEAMS | {"stop_token_ids": list(range(64))},
            "n must be so few that the model has the 130 tokens of which beams are chosen",
        ),
        (
            "completions",
            BEAMS | {"best_of": 3, "stop_token_ids": list(range(64))},
            "best_of must be so few that the model has the 195 tokens",
        ),
        (
            "chat/completions",
            {"min_tokens": 2000},
            "min_tokens must be at most 118, what the context or the default leaves without max_c",
        ),
        (
            "chat/completions",
            {"max_completion_tokens": 3, "min_tokens": 4},
            "min_tokens must be at most max_completion_tokens (3), got 4",
        ),
        (
            "chat/completions",
            {"max_tokens": 3, "min_tokens": 4},
            "min_tokens must be at most max_tokens (3), got 4",
        ),
        (
            "chat/completions",
            {"max_completion_tokens": 1000},
            "messages and max_completion_tokens must fit the model's context of 128 tokens, got 10",
        ),
        (
            "chat/completions",
            {"max_tokens": 1000},
            "messages and max_tokens must fit the model's context of 128 tokens, got 10",
        ),
        ("completions", {"max_tokens": 1000}, "prompt and max_tokens must fit"),
        ("completions", {"logit_bias": {"97": 1}}, "logit_bias: token ids must lie in [0, 97)"),
        (
            "completions",
            {"best_of": 40, "prompt": ["a", "b"]},
            "best_of times the prompts must be at most 64, got 80",
        ),
        (
            "completions",
            {"n": 11, "prompt": ["a", "b"]},
            "n times the prompts must be at most 20, which the server takes at once, got 22",
        ),
    ],
)
def test_sentences(http, route, wrong, words):
    answer = http.post(f"/v1/{route}", json=ROUTES[route][1] | wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(words)
    if "must fit" in words:
        assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"structured_outputs": {"json": {"type": 5}}}, "structured_outputs.json: "),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex: "),
        ({"structured_outputs": {"grammar": "?"}}, "structured_outputs.grammar: "),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice must be texts"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format.json_schema: ",
        ),
        (
            {"response_format": {"type": "json_object"}, "min_tokens": 2},
            "min_tokens must be left out with response_format, which says where the text may end",
        ),
        (
            {"structured_outputs": {"choice": ["a"]}, "ignore_eos": True},
            "ignore_eos must be left out with structured_outputs, which says where the text may",
        ),
    ],
)
def test_sentences_of_forms(http, form, words):
    pytest.importorskip("xgrammar")
    answer = http.post("/v1/completions", json=TEXT | form)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(words)


@pytest.mark.parametrize(
    ("route", "wrong", "words"),
    [
        ("completions", {"stop": ""}, "stop must not hold an empty string"),
        ("completions", {"structured_outputs": {}}, "structured_outputs must hold one of"),
        ("completions", {"logit_bias": {"abc": 1}}, "logit_bias.abc: "),
        ("completions", {"stream_options": {}}, "stream_options must come with stream true"),
        ("embeddings", {"input": ""}, "input must not be empty"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]},
            "messages.0.content.0.type: ",
        ),
    ],
)
def test_a_field_is_named_once_and_without_kinds(http, route, wrong, words):
    answer = http.post(f"/v1/{route}", json=ROUTES[route][1] | wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(words)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", NUMBERS)
def test_words_that_are_no_numbers(http, field, word):
    """Python reads them, though JSON has none."""
    value = f'{{"40": {word}}}' if field == "logit_bias" else word
    answer = http.post("/v1/completions", content=f'{{"prompt": "hello", "{field}": {value}}}')
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]
    assert not ARGUMENTS.search(answer.json()["error"]["message"])


def test_a_chat_that_the_template_refuses():
    engine = tiny_engine()
    engine.tokenizer.chat_template = "{{ raise_exception('no chats today') }}"
    app = create_app(ContinuousBatching(4, engine), ServerConfig("tiny"))
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("messages: ")
        embedded = client.post("/v1/embeddings", content='{"input": "\\ud800"}')
        assert "input" in embedded.json()["error"]["message"]
