"""The answers of the OpenAI-compatible API: whole ones, and streams of chunks."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamatelemetry.inference.request_handle import RequestHandle

_DONE = object()


@dataclass(frozen=True)
class Shape:
    """What a chat's answer and a completion's differ in.

    Attributes:
        prefix: of an answer's id.
        whole, chunk: names of the objects.
        is_chat: whether a choice holds a message, or else a text.
    """

    prefix: str
    whole: str
    chunk: str
    is_chat: bool

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A choice of a whole answer."""
        body: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": finish_reason}
        message = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return body | (message if self.is_chat else {"text": text})

    def piece(
        self, index: int, text: str | None, finish_reason: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        """A choice of a chunk; text None is the last, which says why it ended."""
        body: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": finish_reason}
        delta = {"role": "assistant"} if first else {}
        if text is not None:
            delta["content"] = text
        return body | ({"delta": delta} if self.is_chat else {"text": text or ""})


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", True)
COMPLETION = Shape("cmpl", "text_completion", "text_completion", False)


@dataclass(frozen=True)
class Answer:
    """One answer: its choices are requests of the batcher, in order."""

    shape: Shape
    model: str
    handles: Sequence[RequestHandle]
    n: int  # choices for each prompt
    follow: Any  # Worker.follow with the deadline bound
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.shape.prefix}-{uuid.uuid4().hex}")

    def usage(self) -> dict[str, Any]:
        """Token counts; a prompt that several choices answer counts once."""
        prompts = [handle.request for handle in self.handles[:: self.n]]
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

        async def text_of(handle: RequestHandle) -> str:
            return "".join([piece async for piece in self.follow(handle)])

        tasks = [asyncio.ensure_future(text_of(handle)) for handle in self.handles]
        try:
            texts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        choices = [
            self.shape.choice(i, text, handle.request.finish_reason)
            for i, (text, handle) in enumerate(zip(texts, self.handles, strict=True))
        ]
        return self._body(self.shape.whole, choices) | {"usage": self.usage()}

    async def chunks(self, includes_usage: bool) -> AsyncIterator[str]:
        """The data of server-sent events, of all choices as they come, and [DONE].

        An exception of one choice becomes an error in the stream, which then ends.
        """
        waiting: asyncio.Queue[Any] = asyncio.Queue()

        async def run(index: int, handle: RequestHandle) -> None:
            try:
                async for piece in self.follow(handle):
                    waiting.put_nowait((index, piece, None))
                waiting.put_nowait((index, None, handle.request.finish_reason))
            except Exception as error:
                waiting.put_nowait(error)
            finally:
                waiting.put_nowait(_DONE)

        tasks = [asyncio.ensure_future(run(i, handle)) for i, handle in enumerate(self.handles)]
        extra = {"usage": None} if includes_usage else {}
        try:
            if self.shape.is_chat:
                for index in range(len(tasks)):
                    yield self._chunk([self.shape.piece(index, "", first=True)], extra)
            left = len(tasks)
            while left:
                got = await waiting.get()
                if got is _DONE:
                    left -= 1
                elif isinstance(got, Exception):
                    yield json.dumps({"error": error_body(got)})
                    return
                else:
                    index, text, reason = got
                    yield self._chunk([self.shape.piece(index, text, reason)], extra)
            if includes_usage:
                yield self._chunk([], {"usage": self.usage()})
            yield "[DONE]"
        finally:
            for task in tasks:
                task.cancel()

    def _chunk(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> str:
        return json.dumps(self._body(self.shape.chunk, choices) | extra)

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices}


def error_body(
    error: BaseException | str, kind: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """What the API says of an error."""
    if kind is None:
        kind = "invalid_request_error" if isinstance(error, ValueError) else "server_error"
    message = str(error) or type(error).__name__
    return {"message": message, "type": kind, "param": None, "code": code}
