"""Texts that match: schemas, regular expressions, choices and grammars of a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from batching import is_free

pytest.importorskip("xgrammar")
pytest.importorskip("fastapi")
from http_servers import tiny_engine

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.sampling import GREEDY, SamplingParams
from llamatelemetry.inference.structured import Structures

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "mark": {"enum": ["a", "b"]}},
    "required": ["ok", "mark"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def structures(engine):
    return Structures(engine)


def texts(engine, grammar, count=60):
    batcher = ContinuousBatching(4, engine)
    options = LogitOptions(grammar=grammar)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(6)]
    found = [
        handle.result() for handle in batcher.submit_group("hello", params, count, logits=options)
    ]
    assert is_free(batcher)
    return [(one.text, one.finish_reason) for one in found]


def test_a_choice(engine, structures):
    words = ["yes", 'n"o\\', "maybe"]
    found = texts(engine, structures.choice(words))
    assert {text for text, _ in found} <= set(words)
    assert len(set(found)) > 1
    assert {reason for _, reason in found} == {"stop"}


def test_a_token_that_ends_the_text(engine):
    loaded = engine.loaded
    end = loaded.model.config.vocab_size - 1
    ending = InferenceEngine(dataclasses.replace(loaded, eos_ids=(end,)))
    found = texts(ending, Structures(ending).choice(["yes", "maybe"]))
    last = ending.tokenizer.decode([end])  # is no special token here, so that texts show it
    assert {text.removesuffix(last) for text, _ in found} <= {"yes", "maybe"}
    assert {reason for _, reason in found} == {"stop"}


def test_a_regular_expression(engine, structures):
    for text, reason in texts(engine, structures.regex(r"[a-c]{3}-[0-9]+x")):
        if reason == "stop":
            assert re.fullmatch(r"[a-c]{3}-[0-9]+x", text)
        else:
            assert re.fullmatch(r"[a-c]{3}-[0-9]+", text)


def test_a_schema(engine, structures):
    for text, reason in texts(engine, structures.json_schema(SCHEMA), 100):
        if reason == "stop":
            value = json.loads(text)
            assert isinstance(value["ok"], bool)
            assert value["mark"] in ("a", "b")
        assert text[0] == "{"


def test_any_object(engine, structures):
    assert all(text.startswith("{") for text, _ in texts(engine, structures.json(), 20))


def test_a_grammar_beside_others(engine, structures):
    grammar = structures.grammar('root ::= "(" root ")" | "x"')
    batcher = ContinuousBatching(4, engine)
    plain = batcher.submit("hello", GREEDY, 20)
    bound = batcher.submit("hello", GREEDY, 20, logits=LogitOptions(grammar=grammar))
    alone = ContinuousBatching(1, engine).submit("hello", GREEDY, 20).result()
    assert plain.result().token_ids == alone.token_ids
    text = bound.result().text
    assert re.fullmatch(r"\(*x?\)*", text)


def test_refusals(engine, structures):
    for make, wrong, words in (
        (structures.regex, "(", "regex: .*closed"),
        (structures.regex, 3, "regex must be text"),
        (structures.grammar, "root ::= ", "grammar: "),
        (structures.json_schema, {"type": "bogus"}, "json_schema: .*bogus"),
        (structures.json_schema, "{", "json_schema: "),
        (structures.choice, [], "at least one"),
        (structures.choice, [""], "not empty"),
        (structures.choice, "yes", "must be texts"),
    ):
        with pytest.raises(ValueError, match=words):
            make(wrong)
    options = LogitOptions(grammar=structures.choice(["yes"]))
    batcher = ContinuousBatching(1, engine)
    with pytest.raises(ValueError, match="min_tokens must be left out with a grammar"):
        batcher.submit("x", GREEDY, 9, min_tokens=4, logits=options)
    with pytest.raises(ValueError, match="ignore_eos must be left out with a grammar"):
        batcher.submit("x", GREEDY, 9, ignore_eos=True, logits=options)


def test_a_text_without_an_end_token_goes_on_while_it_can(engine, structures, monkeypatch):
    monkeypatch.setattr(structures, "_eos", ())
    matcher = structures.choice(["yes", "yes please"]).matcher()
    encode = engine.tokenizer.encode
    for token in encode("yes", add_special_tokens=False):
        matcher.accept(token)
    assert not matcher.is_complete
    for token in encode(" please", add_special_tokens=False):
        matcher.accept(token)
    assert matcher.is_complete


def test_a_long_grammar_is_refused(structures):
    with pytest.raises(ValueError, match=r"choice must have at most 65536 characters, got \d+"):
        structures.choice(["word"] * 20000)
