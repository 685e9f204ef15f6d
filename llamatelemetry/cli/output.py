"""Standard output and error as a command needs them: pipes that close, full disks, ASCII."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

CLOSED = 128 + 13  # what a shell shows for a tool that SIGPIPE ended


class OutputError(Exception):
    """Standard output takes no more; the cause is the OSError."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turns what goes wrong with standard output in its body into an OutputError."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        raise OutputError from error


def emit(text: str) -> None:
    """Writes to standard output at once.

    Raises:
        OutputError: it takes no more.
    """
    with writing():
        sys.stdout.write(text)


def guarded(run: Callable[[], int]) -> int:
    """Runs a command whose output may stop; returns its exit code.

    A reader that goes away ends it without a word, as it ends other tools; another error of writing
    is one sentence and 1.
    """
    try:
        code = run()
        emit("")
        return code
    except OutputError as error:
        cause = error.__cause__
    _leave_stdout()
    if isinstance(cause, BrokenPipeError):
        return CLOSED
    reason = getattr(cause, "strerror", None) or cause
    print(f"llamatelemetry: the output cannot be written: {reason}", file=sys.stderr)
    return 1


def _leave_stdout() -> None:
    """Lets what is still unwritten go nowhere, or the interpreter would complain at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def replace_what_a_terminal_lacks() -> None:
    """Prints ? for a character that the output's encoding has none for."""
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            errors = "replace" if stream is sys.stdout else "backslashreplace"
            with contextlib.suppress(ValueError, OSError):
                reconfigure(errors=errors)


@contextlib.contextmanager
def warnings_as_sentences() -> Iterator[None]:
    """Shows warnings of ours as lines on stderr, without the place in the code."""

    def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"llamatelemetry: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
