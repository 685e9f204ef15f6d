"""Calls of tools: texts cut anywhere give the same deltas, and whole answers over HTTP."""

from __future__ import annotations

import json

import pytest
from http_servers import served, tiny_engine

from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.serving.tools import HERMES, LLAMA, MISTRAL, ToolParser, form_of

openai = pytest.importorskip("openai")

RAIN = {"name": "rain", "arguments": {"where": "Ulm", "days": [1, 2]}}
SUN = {"name": "sun", "arguments": {}}


def hermes(*calls):
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


CASES = {
    "hermes": (HERMES, "Let me see.\n" + hermes(RAIN, SUN), "Let me see.", [RAIN, SUN]),
    "hermes alone": (HERMES, hermes(SUN), "", [SUN]),
    "no call": (HERMES, "a < b <tool", "a < b <tool", []),
    "broken": (
        HERMES,
        "<tool_call>{nonsense</tool_call> x",
        "<tool_call>{nonsense</tool_call> x",
        [],
    ),
    "unfinished": (HERMES, '<tool_call>{"name"', '<tool_call>{"name"', []),
    "no name": (HERMES, "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    "llama": (
        LLAMA,
        ' {"name": "rain", "parameters": {"where": "Ulm", "days": [1, 2]}}',
        "",
        [RAIN],
    ),
    "llama marked": (
        LLAMA,
        '<|python_tag|>{"name": "sun", "parameters": {}}; {"name": "sun", "parameters": {}}',
        "",
        [SUN, SUN],
    ),
    "llama text": (LLAMA, "It rains. {}", "It rains. {}", []),
    "llama json": (LLAMA, '  {"a": 1}', '  {"a": 1}', []),
    "llama answer": (LLAMA, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    "space before": (
        HERMES,
        "Hi \n<tool_call>no</tool_call>",
        "Hi \n<tool_call>no</tool_call>",
        [],
    ),
    "mistral": (MISTRAL, "[TOOL_CALLS] " + json.dumps([RAIN, SUN]), "", [RAIN, SUN]),
    "mistral new": (
        MISTRAL,
        'Well[TOOL_CALLS]rain[ARGS]{"where": "Ulm", "days": [1, 2]}[TOOL_CALLS]sun{}',
        "Well",
        [RAIN, SUN],
    ),
    "mistral text": (MISTRAL, "[TOOL] no", "[TOOL] no", []),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_texts_cut_anywhere(name, size):
    form, text, content, calls = CASES[name]
    parser, deltas = ToolParser(form), []
    for begin in range(0, len(text), size):
        deltas += parser.push(text[begin : begin + size])
    deltas += parser.finish()
    assert "".join(delta.get("content", "") for delta in deltas) == content
    found = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in found] == list(range(len(calls)))
    assert len({call["id"] for call in found}) == len(calls) == parser.num_calls
    assert [
        {"name": one["function"]["name"], "arguments": json.loads(one["function"]["arguments"])}
        for one in found
    ] == calls


def test_forms_of_templates():
    assert form_of("{% for t in tools %}<tool_call>") is HERMES
    assert form_of({"default": "x", "tool_use": "tools [TOOL_CALLS]"}) is MISTRAL
    assert form_of("{{ tools }} <|python_tag|>") is LLAMA
    of_qwen_coder = "tools <tool_call><function=name>"
    wrong = [(None, "takes them"), ("hello", "takes them"), ("tools", "Hermes")]
    for template, words in [*wrong, (of_qwen_coder, "has another")]:
        with pytest.raises(ValueError, match=words):
            form_of(template)


TEMPLATE = (
    "{% if tools %}{% for t in tools %}T{{ t.function.name }}={{ t.function | tojson }};"
    "{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}"
    "{% endfor %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]


@pytest.fixture
def client(monkeypatch):
    """Of a server whose model says what the test puts in says."""
    engine = tiny_engine()
    engine.tokenizer.chat_template = TEMPLATE
    says = []
    take = RequestHandle.take

    def spoken(self, drawn):
        if not says:
            return take(self, drawn)
        character = says[0][self.request.num_drawn]
        if self.request.num_drawn + 1 == len(says[0]):
            self.request.stop_ids = {ord(character) - 32}
        return take(self, type(drawn)(ord(character) - 32))

    monkeypatch.setattr(RequestHandle, "take", spoken)
    with (
        served(engine=engine) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as made,
    ):
        made.says = says
        yield made


def test_calls_over_http(client):
    client.says.append(hermes(SUN).replace("\n", ""))
    ask = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "rain?"}],
        "tools": TOOLS,
        "max_tokens": 60,
    }
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("sun", "{}")
    chunks = list(client.chat.completions.create(**ask, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    (streamed,) = [one for delta in deltas for one in delta.tool_calls or []]
    assert (streamed.index, streamed.function.name, streamed.function.arguments) == (0, "sun", "{}")
    assert streamed.id != call.id
    assert "".join(delta.content or "" for delta in deltas) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    ask["tool_choice"] = "none"
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == client.says[0]


def test_tools_and_calls_go_through_the_template(client):
    def count(messages, **more):
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=1, **more
        )
        return answer.usage.prompt_tokens

    user = {"role": "user", "content": "x"}
    assert count([user]) == len("u:x;a:")
    told = "Train=" + json.dumps(TOOLS[0]["function"]) + ";u:x;a:"
    assert count([user], tools=TOOLS) == len(told)
    function = {"name": "f", "arguments": '{"a":1}'}
    call = {"id": "1", "type": "function", "function": function}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "9"}
    assert count([user, asked, result]) == len('u:x;a:<tool_call>{"a": 1};t:9;a:')
    function["arguments"] = "{"
    with pytest.raises(openai.BadRequestError, match="arguments must be JSON"):
        count([user, asked, result])
    with pytest.raises(openai.BadRequestError, match="tool_calls must be the assistant"):
        count([user | {"tool_calls": [call]}])
