"""Calls of functions that a model writes, as its chat template has them: from text to deltas."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_Call = tuple[str, Any]  # name and arguments


@dataclass(frozen=True)
class ToolForm:
    """How a family of models writes calls.

    Attributes:
        begin: what stands before a call.
        end: what stands behind it; None where calls go on to the text's end.
        is_bare: whether a text that begins with { is a call too.
        shown: control tokens that the text must show for it.
        parse: the calls of what stands between begin and end; ValueError for none.
    """

    begin: str
    end: str | None
    is_bare: bool
    shown: tuple[str, ...]
    parse: Callable[[str], list[_Call]]


def _call(value: Any) -> _Call:
    """A call from its JSON.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")
    if not {"arguments", "parameters"} & value.keys():  # an answer that has a name
        raise ValueError("no call")
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], json.loads(arguments) if isinstance(arguments, str) else arguments


def _one(text: str) -> list[_Call]:
    return [_call(json.loads(text))]


def _sequence(text: str) -> list[_Call]:
    """JSON objects with ; or nothing between them."""
    found, rest = [], text.strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        found.append(_call(value))
        rest = rest[end:].lstrip("; \n")
    return found


def _mistral(text: str) -> list[_Call]:
    """A list of calls; or, of newer models, name[ARGS]{...} and each with its own mark."""
    if text.lstrip().startswith("["):
        return [_call(one) for one in json.loads(text)]
    found = []
    for part in text.split("[TOOL_CALLS]"):
        match = re.fullmatch(
            r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+\s*)?(?:\[ARGS\])?\s*(\{.*\})\s*", part, re.S
        )
        if match is None:
            raise ValueError("no call")
        found.append((match[1], json.loads(match[2])))
    return found


HERMES = ToolForm("<tool_call>", "</tool_call>", False, ("<tool_call>", "</tool_call>"), _one)
LLAMA = ToolForm("<|python_tag|>", None, True, ("<|python_tag|>",), _sequence)
MISTRAL = ToolForm("[TOOL_CALLS]", None, False, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), _mistral)

_OTHER_FORM = (
    "tools: the model's chat template must have calls in the form of Hermes and Qwen, of Llama 3.1 "
    "or of Mistral, and has another"
)


def form_of(template: Any) -> ToolForm:
    """The form that a chat template asks for.

    Args:
        template: of the tokenizer; several are a mapping from names.

    Raises:
        ValueError: it takes no tools, or has them called in another form.
    """
    if isinstance(template, Mapping):
        template = template.get("tool_use", template.get("default"))
    text = template if isinstance(template, str) else ""
    if "tools" not in text:
        raise ValueError("tools need a chat template that takes them, and the model's does not")
    if "<function=" in text or "<arg_key>" in text:  # Qwen3-Coder and GLM, between Hermes' marks
        raise ValueError(_OTHER_FORM)
    if "<tool_call>" in text:
        return HERMES
    if "[TOOL_CALLS]" in text:
        return MISTRAL
    if "<|python_tag|>" in text or '"parameters": ' in text:
        return LLAMA
    raise ValueError(_OTHER_FORM)


class ToolParser:
    """Splits one answer's text, as it comes, into deltas of content and of whole calls.

    What begins as a call and is none stays content.

    Attributes:
        num_calls: found so far.
    """

    def __init__(self, form: ToolForm) -> None:
        self.num_calls = 0
        self._form = form
        self._held = self._opened = ""
        self._is_inside = self._has_begun = False

    def push(self, text: str) -> list[dict[str, Any]]:
        """The deltas that more text makes certain."""
        self._held += text
        form = self._form
        deltas: list[dict[str, Any]] = []
        while True:
            if not self._is_inside and not self._open(deltas):
                break
            if form.end is None or form.end not in self._held:
                break
            inner, _, self._held = self._held.partition(form.end)
            self._is_inside = False
            deltas += self._calls(inner, form.end)
        return deltas

    def finish(self) -> list[dict[str, Any]]:
        """The deltas of what was held back."""
        held, self._held = self._held, ""
        return self._calls(held, "") if self._is_inside else self._content(held)

    def _open(self, deltas: list[dict[str, Any]]) -> bool:
        """Whether a call begins in what is held; content before it goes to deltas."""
        form = self._form
        if form.is_bare and not self._has_begun:
            start = self._held.lstrip()
            if start.startswith("{"):
                self._opened = self._held[: len(self._held) - len(start)]
                self._held = start
                self._is_inside = self._has_begun = True
                return True
            self._has_begun = bool(start)
        before, begin, after = self._held.partition(form.begin)
        if begin:
            said = before.rstrip()
            deltas += self._content(said)
            self._held, self._opened = after, before[len(said) :] + begin
            self._is_inside = True
            return True
        certain = len(self._held) - self._open_length()
        # White space may stand before a call, and goes then.
        certain = len(self._held[:certain].rstrip())
        deltas += self._content(self._held[:certain])
        self._held = self._held[certain:]
        return False

    def _open_length(self) -> int:
        """Length of the longest end of what is held that begins a call's mark."""
        begin = self._form.begin
        lengths = range(min(len(begin) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if begin.startswith(self._held[-n:])), 0)

    def _content(self, text: str) -> list[dict[str, Any]]:
        if not text or (self.num_calls and not text.strip()):
            return []
        return [{"content": text}]

    def _calls(self, inner: str, end: str) -> list[dict[str, Any]]:
        try:
            found = self._form.parse(inner)
        except (ValueError, RecursionError):
            return self._content(self._opened + inner + end)
        deltas = []
        for name, arguments in found:
            # As ASCII: half of a surrogate pair, which a model may write, has no bytes.
            function = {"name": name, "arguments": json.dumps(arguments)}
            call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
            deltas.append({"tool_calls": [{"index": self.num_calls, **call, "function": function}]})
            self.num_calls += 1
        return deltas
