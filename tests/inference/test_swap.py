"""Requests that give up their blocks and have them back from the host's memory."""

from __future__ import annotations

import pytest
from batching import COUNTS, PROMPTS, is_free
from families import tiny_model
from scheduling import PAGE, World, a_request, alone, run

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.host_pages import HostPages
from llamatelemetry.inference.kv_pages import KvPages
from llamatelemetry.inference.scheduler import Scheduler


@pytest.mark.parametrize(("num_host_blocks", "computed_anew"), [(0, 4), (9, 0)])
def test_what_the_host_keeps_is_not_computed_again(num_host_blocks, computed_anew):
    blocks = BlockManager(9, PAGE, share_prefixes=False)
    world = World(Scheduler(blocks, 16, 4, 0.0, num_host_blocks))
    requests = [a_request(name, prompt_tokens=4, max_tokens=20) for name in range(4)]
    for one in requests:
        world.scheduler.add(one)
    plans = run(world)
    assert sum(one.preemptions for one in requests) >= 1
    whole = sum(len(one.tokens) - 1 for one in requests)
    again = sum(plan.num_tokens for plan in plans) - whole
    assert again >= computed_anew if computed_anew else again == 0
    assert (world.swapped > 0) == (num_host_blocks > 0)
    for one in requests:
        assert one.tokens[4:] == alone(one.prompt, 20, 0, ())


def test_what_the_host_keeps_goes_with_its_request():
    blocks = BlockManager(9, PAGE, share_prefixes=False)
    world = World(Scheduler(blocks, 16, 4, 0.0, 9))
    requests = [a_request(name, prompt_tokens=4, max_tokens=20) for name in range(4)]
    for one in requests:
        world.scheduler.add(one)
    plan = next(plan for plan in iter(world.step, None) if plan.preempted)
    assert world.scheduler.host.num_available < 9
    for one in plan.preempted:
        world.scheduler.end(one, "cancelled")
    assert world.scheduler.host.num_available == 9


def test_what_the_host_kept_is_not_shared():
    blocks = BlockManager(20, PAGE)
    world = World(Scheduler(blocks, 16, 4, num_host_blocks=9))
    first = a_request(0, prompt_tokens=7, max_tokens=9)
    world.scheduler.add(first)
    plan = world.step()
    world.scheduler.preempt(first, plan)
    world.swap(plan)
    blocks.forget_prefixes()
    world.step()
    second = a_request(0, prompt_tokens=7, max_tokens=3)
    second.name = second.arrival = 1
    world.scheduler.add(second)
    world.step()
    assert (first.num_computed, second.num_cached) == (9, 0)


@pytest.mark.parametrize("overlap", [False, True])
def test_swapped_requests_give_the_tokens_of_those_that_stay(device, monkeypatch, overlap):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", 4)
    model = tiny_model("llama", device)

    def run(**options):
        batcher = ContinuousBatching(5, model, share_prefixes=False, overlap=overlap, **options)
        batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some are preempted
        handles = []
        for prompt, count in zip(PROMPTS, COUNTS, strict=True):
            handles.append(batcher.submit(prompt, max_tokens=count))
            batcher.step()
        batcher.run()
        assert is_free(batcher)
        assert batcher._batch.scheduler.host.num_available == options.get("num_host_blocks", 0)
        return [h.token_ids for h in handles], sum(h.stats.preemptions for h in handles)

    wanted, _ = run()
    found, preemptions = run(num_blocks=12, num_host_blocks=40)
    assert found == wanted
    assert preemptions > 0


def test_all_pages_of_fixed_numbers_are_there_at_the_start(device):
    batcher = ContinuousBatching(2, tiny_model("llama", device), num_blocks=3, num_host_blocks=5)
    pages, host = batcher._batch._runner.runner.pages, batcher._batch._host
    assert (pages.num_bytes, host.num_bytes) == (3 * pages.block_bytes, 5 * pages.block_bytes)


@pytest.mark.parametrize(
    ("kind", "name"), [(KvPages, "num_blocks"), (HostPages, "num_host_blocks")]
)
def test_more_than_memory_holds_is_refused_at_the_start(device, monkeypatch, kind, name):
    def no_memory(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nand a long story")

    monkeypatch.setattr(kind, {KvPages: "grow", HostPages: "allocate"}[kind], no_memory)
    model = tiny_model("llama", device)
    sentence = (
        f"{name} must be as many as there is memory for, got 3 of [0-9]+ bytes: CUDA .*memory$"
    )
    with pytest.raises(ValueError, match=sentence):
        ContinuousBatching(2, model, **{"num_blocks": 3, "num_host_blocks": 3})
