"""Streams whose clients go before they begin, or read nothing: as ASGI calls, without a socket."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial

import pytest
from http_servers import tiny_engine

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.serving.answers import COMPLETION, Answer
from llamatelemetry.serving.app import ServerConfig, create_app
from llamatelemetry.serving.metrics import Metrics
from llamatelemetry.serving.worker import Worker


def scope():
    path = "/v1/completions"
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
    }


def receiver(body, disconnects):
    """The body, then a disconnect once the event is set."""
    given = False

    async def receive():
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await disconnects.wait()
        return {"type": "http.disconnect"}

    return receive


ASK = {"prompt": "hello", "max_tokens": 100, "temperature": 0, "stream": True}


def test_a_client_that_goes_before_the_first_chunk_ends_its_requests():
    async def run():
        batcher = ContinuousBatching(4, tiny_engine())
        app = create_app(batcher, ServerConfig("tiny"))  # not started: no step is ever made
        gone = asyncio.Event()
        gone.set()

        async def send(_):
            await asyncio.sleep(60)

        await asyncio.wait_for(app(scope(), receiver(ASK | {"n": 3}, gone), send), 30)
        return batcher

    batcher = asyncio.run(run())
    assert batcher.active_requests == []
    assert not batcher._batch.open
    assert not batcher._batch.incoming


def test_a_client_that_reads_nothing_stops_no_other_and_is_left():
    async def run():
        batcher = ContinuousBatching(4, tiny_engine())
        app = create_app(batcher, ServerConfig("tiny", send_timeout_s=0.3))
        stuck, told = 0, []

        async def reads_nothing(message):
            nonlocal stuck
            if message["type"] == "http.response.body":
                stuck += 1
                await asyncio.sleep(60)

        async def reads(message):
            told.append(message.get("body", b""))

        async with app.router.lifespan_context(app):
            slow = asyncio.create_task(app(scope(), receiver(ASK, asyncio.Event()), reads_nothing))
            for _ in range(2):
                await app(scope(), receiver(ASK | {"max_tokens": 20}, asyncio.Event()), reads)
            await asyncio.wait_for(slow, 30)
            return stuck, b"".join(told).count(b"[DONE]"), batcher.active_requests

    assert asyncio.run(run()) == (1, 2, [])


def test_a_reader_that_is_slow_is_held_to_the_time_limit():
    async def run():
        batcher = ContinuousBatching(4, tiny_engine())
        step = batcher.step
        batcher.step = lambda: (time.sleep(0.01), step())[1]  # 100 tokens take a second
        worker = Worker(batcher, 4)
        worker.start()
        (handle,) = worker.submit(["hello"], [GREEDY], max_tokens=100)
        count = 0

        async def read():
            nonlocal count
            async for _ in worker.follow(handle, 0.2):
                count += 1
                await asyncio.sleep(0.03)  # whenever it looks, a step was made

        with pytest.raises(TimeoutError, match="must end within"):
            await read()
        await worker.drain(1.0)
        return count, handle

    count, handle = asyncio.run(run())
    assert 0 < count <= 12
    assert handle.cancelled()


def test_a_client_that_leaves_during_a_step_is_an_abort():
    batcher = ContinuousBatching(4, tiny_engine())
    metrics = Metrics("tiny", lambda: 0, batcher.telemetry)
    handle, other = (batcher.submit("hello", max_tokens=3) for _ in range(2))
    with batcher._turns.held():  # as while a step is in progress
        handle.cancel()
        assert handle.request.finish_reason is None
        metrics.ended(handle)
    other.cancel()
    metrics.ended(other)
    text = metrics.text().decode()
    assert 'request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in text
    assert 'finished_reason="error"' not in text


def test_chunks_are_made_as_they_are_taken():
    made = 0

    async def follow(_):
        nonlocal made
        for _ in range(1000):
            made += 1
            yield "x", made

    async def run():
        batcher = ContinuousBatching(1, tiny_engine())
        handle = batcher.submit("hello", max_tokens=1)
        answer = Answer(COMPLETION, "tiny", [handle], 1, 1, partial(follow))
        chunks = answer.chunks(False)
        for _ in range(3):
            await anext(chunks)
        await asyncio.sleep(0.05)
        await chunks.aclose()

    asyncio.run(run())
    assert made <= 6
