"""The thread that steps the batcher, and what requests of an event loop see of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.embedding import Embedder, Pooling
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.sampling import SamplingParams

_log = logging.getLogger("llamatelemetry")


class ServerBusy(RuntimeError):
    """As many requests are open as may be, or the server is shutting down."""


class Worker:
    """Runs the steps of a ContinuousBatching in a thread of its own, as long as there are any.

    submit and follow are called from one event loop, which start names.

    Args:
        batcher: ContinuousBatching with an engine.
        max_open: requests open at once, those that wait included.
        pooling: of the embedder.

    Attributes:
        embedder: Embedder of the batcher's model, for between_steps.
        failure: what ended the thread, if an exception did.
    """

    def __init__(
        self, batcher: ContinuousBatching, max_open: int, pooling: Pooling = "mean"
    ) -> None:
        self.batcher, self.max_open = batcher, max_open
        self.embedder = Embedder(batcher.model, pooling)
        self.failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stepped: asyncio.Future[None]
        self._work = threading.Event()
        self._jobs: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._num_admitted = 0
        self._is_draining = self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="llamatelemetry-steps", daemon=True)

    def start(self) -> None:
        """Begins to step; called in the event loop that will follow requests."""
        self._loop = asyncio.get_running_loop()
        self._stepped = self._loop.create_future()
        self._thread.start()

    @property
    def num_open(self) -> int:
        return len(self.batcher.active_requests) + self._num_admitted

    def submit(
        self, prompts: Sequence[Any], params: Sequence[SamplingParams], **options: Any
    ) -> list[RequestHandle]:
        """Hands requests to the batcher, all or none.

        Args:
            prompts: of each as many answers as there are params.
            params: of the answers to one prompt.
            options: as ContinuousBatching.submit_group takes them, the same for all.

        Raises:
            ServerBusy: there is no room for so many more.
            ValueError: there never is for so many.
            Exception: what the batcher refuses.
        """
        count = len(prompts) * len(params)
        if count > self.max_open:
            raise ValueError(
                f"n times the prompts must be at most {self.max_open}, which the server takes at "
                f"once, got {count}"
            )
        self._require_room(count)
        handles: list[RequestHandle] = []
        try:
            for prompt in prompts:
                handles += self.batcher.submit_group(prompt, params, **options)
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        self._work.set()
        return handles

    def _require_room(self, count: int) -> None:
        if self.failure is not None:
            raise ServerBusy(f"the server's steps have ended: {self.failure}")
        if self._is_draining:
            raise ServerBusy("the server is shutting down")
        if self.num_open + count > self.max_open:
            raise ServerBusy(
                f"the server takes {self.max_open} requests at once, and {self.num_open} are open"
            )

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """One open request, of whatever kind.

        Raises:
            ServerBusy: there is no room for one more.
        """
        self._require_room(1)
        self._num_admitted += 1
        try:
            yield
        finally:
            self._num_admitted -= 1

    async def between_steps(self, work: Callable[[], Any]) -> Any:
        """What work gives, which the thread of steps calls before its next one: for short ones.

        One that is cancelled before it begins is left out.

        Raises:
            RuntimeError: the thread has ended.
            Exception: what work raises.
        """
        future = asyncio.get_running_loop().create_future()
        self._jobs.append((work, future))
        self._work.set()
        if not self._thread.is_alive():
            raise RuntimeError(f"the server's steps have ended: {self.failure}")
        return await future

    async def follow(
        self, handle: RequestHandle, timeout: float
    ) -> AsyncGenerator[tuple[str, int], None]:
        """Pieces of a request's text as they come, each with how many tokens were drawn by then;
        cancels it when the caller goes.

        Args:
            handle: of submit.
            timeout: seconds from now until which the request must have ended.

        Raises:
            TimeoutError: it has not; it is cancelled.
            Exception: what ended the request.
        """
        count, end = 0, time.monotonic() + timeout

        def check_time() -> None:
            if time.monotonic() > end and not handle.done():
                raise TimeoutError(f"the request must end within {timeout} s")

        try:
            while True:
                stepped = self._stepped
                pieces, is_done = handle.pieces_from(count)
                for i, piece in enumerate(pieces, count):
                    check_time()  # the caller may have taken long for the last one
                    yield piece, handle.drawn_by(i)
                count += len(pieces)
                if is_done:
                    break
                if self.failure is not None:
                    raise RuntimeError(f"the server's steps have ended: {self.failure}")
                # Not wait_for, which until Python 3.12 forgets a cancellation that meets a result.
                check_time()
                await asyncio.wait([stepped], timeout=max(end - time.monotonic(), 0))
        finally:
            handle.cancel()
        if handle.error is not None:
            raise handle.error

    async def drain(self, seconds: float) -> int:
        """Takes no more requests, and waits for those that are open.

        Args:
            seconds: after so many, those still open are cancelled.

        Returns:
            How many had to be cancelled.
        """
        self._is_draining = True
        end = time.monotonic() + seconds
        while self.num_open and self.failure is None and time.monotonic() < end:
            await asyncio.sleep(0.02)
        left = self.batcher.active_requests
        for handle in left:
            handle.cancel()
        self._is_stopped = True
        self._work.set()
        await asyncio.to_thread(self._thread.join, 5.0)
        return len(left)

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._run_job()
                if self.batcher.active_requests:
                    self.batcher.step()
                    self._tell()
                elif not self._jobs:
                    self._tell()
                    self._work.wait(1.0)
                    self._work.clear()
        except BaseException as error:
            self.failure = error
            _log.exception("the server's steps have ended")
            self._tell()
        finally:
            while self._jobs:
                _, future = self._jobs.popleft()
                self._answer(future, None, RuntimeError("the server's steps have ended"))

    def _run_job(self) -> None:
        """One of what is to be done between two steps."""
        if not self._jobs:
            return
        work, future = self._jobs.popleft()
        if future.cancelled():
            return
        try:
            result = work()
        except Exception as error:
            self._answer(future, None, error)
        else:
            self._answer(future, result, None)

    def _answer(self, future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        """Tells a future of the event loop, unless nobody waits for it any more."""

        def tell() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(tell)

    def _tell(self) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody follows any more
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        """Everyone who waits for a step looks; the next wait is for the next step."""
        assert self._loop is not None
        stepped, self._stepped = self._stepped, self._loop.create_future()
        stepped.set_result(None)
