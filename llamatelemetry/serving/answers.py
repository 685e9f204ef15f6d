"""The answers of the OpenAI-compatible API: whole ones, and streams of chunks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llamatelemetry.inference.arguments import ContextLengthError
from llamatelemetry.inference.block_manager import OutOfBlocks
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.serving.logprobs import TokenNames
from llamatelemetry.serving.tools import ToolForm, ToolParser

_DONE = object()
# What clients may look for in an error's code.
_CODES: dict[type[BaseException], str] = {
    ContextLengthError: "context_length_exceeded",
    OutOfBlocks: "out_of_kv_cache",
    torch.OutOfMemoryError: "out_of_memory",
    MemoryError: "out_of_memory",
}


@dataclass(frozen=True)
class Shape:
    """What a chat's answer and a completion's differ in.

    Attributes:
        prefix: of an answer's id.
        whole, chunk: names of the objects.
        is_chat: whether a choice holds a message, or else a text.
        operation: what OpenTelemetry calls it.
    """

    prefix: str
    whole: str
    chunk: str
    is_chat: bool
    operation: str

    def choice(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """What a choice of a whole answer says."""
        if not self.is_chat:
            return {"text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {"message": message}

    def piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        """What a choice of a chunk says; an empty delta is the last, which says why it ended."""
        return {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", True, "chat")
COMPLETION = Shape("cmpl", "text_completion", "text_completion", False, "text_completion")


@dataclass(frozen=True)
class Answer:
    """One answer: its choices are requests of the batcher, in order.

    Attributes:
        shape, model: what it is an answer of.
        handles: drawn of them for each prompt.
        n: choices for each prompt; where more were drawn, the most probable ones by the mean
            log-probability of their tokens.
        drawn: requests for each prompt.
        follow: Worker.follow with the deadline bound.
        names: of tokens, where log-probabilities are to be told.
        form: of calls, where the model may call tools.
    """

    shape: Shape
    model: str
    handles: Sequence[RequestHandle]
    n: int
    drawn: int
    follow: Any
    names: TokenNames | None = None
    form: ToolForm | None = None
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.shape.prefix}-{uuid.uuid4().hex}")

    def usage(self) -> dict[str, Any]:
        """Token counts; a prompt that several choices answer counts once."""
        prompts = [handle.request for handle in self.handles[:: self.drawn]]
        prompt = sum(len(request.prompt) for request in prompts)
        drawn = sum(handle.request.num_drawn for handle in self.handles)
        cached = sum(request.num_cached or 0 for request in prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def whole(self) -> dict[str, Any]:
        """Waits for every choice."""

        async def choice_of(handle: RequestHandle) -> dict[str, Any]:
            async with contextlib.aclosing(self.follow(handle)) as pieces:
                text = "".join([piece async for piece, _ in pieces])
            calls: list[dict[str, Any]] = []
            if self.form is not None:
                parser = ToolParser(self.form)
                deltas = [*parser.push(text), *parser.finish()]
                text = "".join(delta.get("content", "") for delta in deltas)
                calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
                calls = [{k: v for k, v in call.items() if k != "index"} for call in calls]
            body = {
                "logprobs": self._logprobs(handle, 0, handle.request.num_drawn, 0),
                "finish_reason": _reason(handle, len(calls)),
            }
            return body | self.shape.choice(text, calls)

        tasks = [asyncio.ensure_future(choice_of(handle)) for handle in self.handles]
        try:
            choices = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        kept = [{"index": i} | choices[j] for i, j in enumerate(self._best())]
        return self._body(self.shape.whole, kept) | {"usage": self.usage()}

    def _best(self) -> list[int]:
        """Which of the handles are the choices."""

        def mean(i: int) -> float:
            found = self.handles[i].logprobs
            return -sum(one.logprob for one in found) / max(len(found), 1)

        kept: list[int] = []
        for begin in range(0, len(self.handles), self.drawn):
            rows = range(begin, begin + self.drawn)
            kept += rows if self.n == self.drawn else sorted(rows, key=mean)[: self.n]
        return kept

    async def chunks(self, includes_usage: bool) -> AsyncGenerator[str, None]:
        """The data of server-sent events, of all choices as they come, and [DONE].

        An exception of one choice becomes an error in the stream, which then ends. No chunk is
        made before the one before it is taken: for a client that reads nothing, nothing piles up
        but the text itself.
        """
        waiting: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)

        async def run(index: int, handle: RequestHandle) -> None:
            try:
                async with contextlib.aclosing(self._choices(handle)) as choices:
                    async for choice in choices:
                        await waiting.put({"index": index} | choice)
            except Exception as error:
                await waiting.put(error)
            await waiting.put(_DONE)

        tasks = [asyncio.ensure_future(run(i, handle)) for i, handle in enumerate(self.handles)]
        extra = {"usage": None} if includes_usage else {}
        try:
            if self.shape.is_chat:
                first = self.shape.piece({"role": "assistant", "content": ""})
                for index in range(len(tasks)):
                    body = {"index": index, "logprobs": None, "finish_reason": None}
                    yield self._chunk([body | first], extra)
            left = len(tasks)
            while left:
                got = await waiting.get()
                if got is _DONE:
                    left -= 1
                elif isinstance(got, Exception):
                    yield json.dumps({"error": error_body(got)})
                    return
                else:
                    yield self._chunk([got], extra)
            if includes_usage:
                yield self._chunk([], {"usage": self.usage()})
            yield "[DONE]"
        finally:
            for task in tasks:
                task.cancel()

    async def _choices(self, handle: RequestHandle) -> AsyncGenerator[dict[str, Any], None]:
        """One choice's part of each chunk: a delta with the log-probabilities of the tokens since
        the last, and at the end why it ended."""
        parser = None if self.form is None else ToolParser(self.form)
        told = length = 0
        async with contextlib.aclosing(self.follow(handle)) as pieces:
            async for text, end in pieces:
                for delta in [{"content": text}] if parser is None else parser.push(text):
                    logprobs = self._logprobs(handle, told, end, length)
                    told, length = end, length + len(delta.get("content", ""))
                    yield {"logprobs": logprobs, "finish_reason": None} | self.shape.piece(delta)
        for delta in [] if parser is None else parser.finish():
            yield {"logprobs": None, "finish_reason": None} | self.shape.piece(delta)
        body: dict[str, Any] = {
            "logprobs": self._logprobs(handle, told, handle.request.num_drawn, length),
            "finish_reason": _reason(handle, 0 if parser is None else parser.num_calls),
        }
        yield body | self.shape.piece({})

    def _logprobs(
        self, handle: RequestHandle, begin: int, end: int, offset: int
    ) -> dict[str, Any] | None:
        """Of the tokens [begin, end) that were drawn; None for none, and where none are told."""
        if self.names is None or begin == end:
            return None
        tokens, found = handle.token_ids[begin:end], handle.logprobs[begin:end]
        if self.shape.is_chat:
            return self.names.chat(tokens, found)
        return self.names.completion(tokens, found, offset)

    def _chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> str:
        return json.dumps(self._body(self.shape.chunk, choices) | extra)

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices}


def _reason(handle: RequestHandle, num_calls: int) -> str | None:
    reason = handle.request.finish_reason
    return "tool_calls" if num_calls and reason == "stop" else reason


def error_body(
    error: BaseException | str, kind: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """What the API says of an error."""
    if kind is None:
        kind = "invalid_request_error" if isinstance(error, ValueError) else "server_error"
    for failure, name in _CODES.items():
        if code is None and isinstance(error, failure):
            code = name
    message = str(error) or type(error).__name__
    return {"message": message, "type": kind, "param": None, "code": code}
