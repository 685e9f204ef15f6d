"""Requests in coroutines: async for, await, and what a cancellation ends."""

from __future__ import annotations

import asyncio

import pytest
from batching import is_free
from http_servers import tiny_engine

from llamatelemetry.inference.continuous import ContinuousBatching


@pytest.fixture
def batcher():
    return ContinuousBatching(4, tiny_engine())


def test_async_for_and_await_give_what_iterating_and_result_do(batcher):
    texts = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    wanted = [batcher.submit(text, max_tokens=9).result() for text in texts]

    async def stream(text):
        return [piece async for piece in batcher.submit(text, max_tokens=9)]

    async def run():
        streams = asyncio.gather(*map(stream, texts))
        results = [await batcher.submit(text, max_tokens=9) for text in texts]
        return await streams, results

    streams, results = asyncio.run(run())
    for pieces, result, want in zip(streams, results, wanted, strict=True):
        assert "".join(pieces) == result.text == want.text
        assert len(pieces) > 1
        assert result.token_ids == want.token_ids
    assert is_free(batcher)


def test_a_coroutine_that_is_cancelled_cancels_its_request(batcher):
    async def run():
        handle = batcher.submit("hello", max_tokens=100)
        task = asyncio.ensure_future(handle._awaited())
        while handle.request.num_drawn < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle

    handle = asyncio.run(run())
    assert handle.cancelled()
    assert handle.request.num_drawn < 100
    assert is_free(batcher)


def test_a_cancelled_request_ends_its_stream_and_is_a_cancellation_to_await(batcher):
    async def run():
        handle = batcher.submit("hello", max_tokens=50)
        count = 0
        async for _ in handle:
            count += 1
            if count == 2:
                handle.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handle
        return count

    assert 2 <= asyncio.run(run()) < 10
    assert is_free(batcher)
