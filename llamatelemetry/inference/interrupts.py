"""Ctrl-C between two lines of books that belong together waits until they agree again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])
_is_open = False  # whether the main thread is within uninterrupted, which puts off all it calls


@contextmanager
def uninterrupted() -> Iterator[None]:
    """An interrupt of the main thread that comes meanwhile is raised at the end; others do not come
    to a thread. For what takes no longer than a step."""
    global _is_open
    if _is_open or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, the system's own, or not one of Python
        yield
        return
    came: list[tuple[Any, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    _is_open = True
    try:
        yield
    finally:
        _is_open = False
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def as_one(method: _Method) -> _Method:
    """A method whose lines are uninterrupted."""

    @wraps(method)
    def whole(*args: Any, **kwargs: Any) -> Any:
        if _is_open:  # of the main thread; others need none
            return method(*args, **kwargs)
        with uninterrupted():
            return method(*args, **kwargs)

    return whole  # type: ignore[return-value]
