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


class _Handler:
    """Passes interrupts on, or keeps the first while the main thread is uninterrupted."""

    def __init__(self, handler: Callable[..., Any]) -> None:
        self.handler = handler
        self.kept: tuple[Any, ...] = ()

    def __call__(self, *interrupt: Any) -> None:
        if not _is_open:
            self.handler(*interrupt)
        elif not self.kept:
            self.kept = interrupt

    def pass_on(self) -> None:
        if kept := self.kept:
            self.kept = ()
            self.handler(*kept)


_ours: _Handler | None = None  # the handler that is set meanwhile


@contextmanager
def watched() -> Iterator[None]:
    """Around much that is uninterrupted, which then sets no handler by itself: that takes longer
    than what is done for a row of a step."""
    global _ours
    if _ours is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, the system's own, or not one of Python
        yield
        return
    _ours = _Handler(handler)
    try:
        signal.signal(signal.SIGINT, _ours)
        yield
    finally:
        _ours = None
        signal.signal(signal.SIGINT, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """An interrupt of the main thread that comes meanwhile is raised at the end; others do not come
    to a thread. For what takes no longer than a step."""
    global _is_open
    if _is_open or threading.current_thread() is not threading.main_thread():
        yield
        return
    with watched():
        ours = _ours
        if ours is None:
            yield
            return
        _is_open = True
        try:
            yield
        finally:
            _is_open = False
            ours.pass_on()


def as_one(method: _Method) -> _Method:
    """A method whose lines are uninterrupted."""

    @wraps(method)
    def whole(*args: Any, **kwargs: Any) -> Any:
        global _is_open
        if _is_open:  # of the main thread; others need none
            return method(*args, **kwargs)
        ours = _ours
        if ours is None or threading.get_ident() != threading.main_thread().ident:
            with uninterrupted():
                return method(*args, **kwargs)
        _is_open = True  # as uninterrupted does within watched, without its generators
        try:
            return method(*args, **kwargs)
        finally:
            _is_open = False
            ours.pass_on()

    return whole  # type: ignore[return-value]
