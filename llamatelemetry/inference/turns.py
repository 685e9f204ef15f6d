"""Who runs the steps of a batch: whoever waits for one of its requests, one thread at a time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llamatelemetry.inference.arguments import real
from llamatelemetry.inference.interrupts import uninterrupted, watched
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.running_batch import RunningBatch
from llamatelemetry.inference.telemetry import Telemetry
from llamatelemetry.models.forked import note_step

_POLL_S = 0.02  # a thread that waits for another's step looks again


class Turns:
    """The lock around a RunningBatch, and those who wait for it.

    Args:
        batch: RunningBatch.

    Attributes:
        telemetry: Telemetry of its steps.
    """

    def __init__(self, batch: RunningBatch) -> None:
        self.batch, self.telemetry = batch, Telemetry(batch)
        self._lock = threading.Lock()
        self._progress = threading.Condition()

    @contextmanager
    def held(self) -> Iterator[RunningBatch]:
        """The batch, while no other thread steps it."""
        with self._lock:
            yield self.batch

    def step(self) -> list[RequestHandle]:
        """One step; see RunningBatch.step."""
        with self._lock:
            handles = self._step()
        self._tell()
        return handles

    def _step(self) -> list[RequestHandle]:
        note_step()  # inside the batch its error would end a request, as another one's
        begin = time.perf_counter()
        with watched():
            handles = self.batch.step()
        self.telemetry.note_step(begin, time.perf_counter(), self.batch, handles)
        return handles

    def drive(self, until: Callable[[], bool], timeout: float | None) -> None:
        """Steps until something is so, or waits while another thread does.

        Raises:
            TimeoutError: it is not so after timeout seconds.
            ValueError: timeout is no number.
        """
        if timeout is not None and math.isnan(real("timeout", timeout)):
            raise ValueError(f"timeout must be a number of seconds, got {timeout}")
        end = None if timeout is None else time.monotonic() + timeout
        while not until():
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"the request must end within {timeout} s, it has not")
            if self._tried(lambda: None if until() else self._step()):
                self._tell()
            else:
                with self._progress:
                    self._progress.wait(_POLL_S)

    def sweep(self) -> None:
        """Ends what was cancelled now, or before the next step where one is in progress."""
        if self._tried(lambda: self.telemetry.note_ends(self.batch, self.batch.reap())):
            self._tell()

    def _tried(self, action: Callable[[], object]) -> bool:
        """Whether an action was run, because no other thread has the lock."""
        is_taken = False
        try:
            with uninterrupted():  # or the lock were taken and nobody knew
                is_taken = self._lock.acquire(blocking=False)
            if is_taken:
                action()
        finally:
            if is_taken:
                self._lock.release()
        return is_taken

    def _tell(self) -> None:
        with self._progress:
            self._progress.notify_all()
