"""Server-sent events of one answer, whose end is told of however it comes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, MutableMapping
from typing import Any

from sse_starlette.sse import EventSourceResponse, SendTimeoutError

_log = logging.getLogger("llamatelemetry")


class EventStream(EventSourceResponse):
    """A response of server-sent events.

    Args:
        chunks: data of each event.
        end: called once the response is over, also where its client went before the first chunk
            was asked for: a generator that never began runs no clean-up of its own.
        send_timeout_s: a client that takes nothing for so long is left.
        drain_s: how long a server that shuts down lets the stream go on.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[str, None],
        end: Callable[[], None],
        *,
        send_timeout_s: float,
        drain_s: float,
    ) -> None:
        super().__init__(
            _events(chunks), send_timeout=send_timeout_s, shutdown_grace_period=drain_s
        )
        self._end, self._limit_s = end, send_timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _log.warning("a client took nothing of its stream for %g s and was left", self._limit_s)
        finally:
            self._end()


async def _events(chunks: AsyncGenerator[str, None]) -> AsyncIterator[MutableMapping[str, str]]:
    async with contextlib.aclosing(chunks):
        async for data in chunks:
            yield {"data": data}
