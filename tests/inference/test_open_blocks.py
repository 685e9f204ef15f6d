"""Blocks of a model that has changed are not shared."""

from __future__ import annotations

from test_open_changes import COUNT, PROMPT, _other_eps, stepwise, twins

from llamatelemetry.inference.continuous import ContinuousBatching


def test_a_block_that_two_models_have_filled_is_not_shared():
    plain, ours = twins()
    prompt = (PROMPT * 9)[:100]
    batcher = ContinuousBatching(2, ours)
    first = prompt[:60]  # fills its block of 64 after the change
    handle = batcher.submit(first, max_tokens=COUNT)
    while handle.request.num_drawn < 2:
        batcher.step()
    _other_eps(plain), _other_eps(ours)
    batcher.submit([5, 6, 7], max_tokens=2).result()
    prompt = first + handle.result().token_ids + [4, 5]
    handle = batcher.submit(prompt, max_tokens=COUNT)
    assert handle.result().token_ids == stepwise(plain, prompt=prompt)
    assert handle.stats.cached_tokens == 0
