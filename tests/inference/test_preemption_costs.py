"""Blocks that are given up are copied to the host, or computed again: what is sooner."""

from __future__ import annotations

import pytest
import torch
from batching import COUNTS, PROMPTS, is_free
from families import tiny_model
from scheduling import PAGE, World, a_request, run

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.block_manager import BlockManager
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.plan import Piece
from llamatelemetry.inference.preemption_costs import AGAIN, LEAST, PreemptionCosts
from llamatelemetry.inference.scheduler import Scheduler
from llamatelemetry.inference.stopwatch import Stopwatch


def prompt_of(count):
    return [Piece(a_request(0, prompt_tokens=count, max_tokens=1), 0, count, [], True)]


def row():
    request = a_request(1, prompt_tokens=4, max_tokens=4)
    return Piece(request, 4, 5, [], True)


def test_what_is_sooner():
    costs = PreemptionCosts()
    costs.note_copies(10, 9.0)  # into memory that nobody has touched
    for i in range(LEAST):
        assert costs.favours_copies(4, 1)  # nothing is known
        costs.note_copies(10, 0.01)  # a block in 1 ms, one way
        costs.note_forward(prompt_of(100), 0.1 if i else 9.0)  # a token in 1 ms; one warms up
    assert costs.favours_copies(4, 8)
    assert not costs.favours_copies(4, 7)


def test_long_forwards_say_what_a_token_takes():
    costs = PreemptionCosts()
    costs.note_copies(1, 0.0)
    for _ in range(LEAST):
        costs.note_copies(1, 0.1)
        costs.note_forward(prompt_of(2), 1.0)  # as long as one of 256 tokens
    costs.note_forward(prompt_of(256), 1.0)
    assert not costs.favours_copies(1, 32)
    assert costs.favours_copies(1, 64)


def test_copies_that_were_slow_are_tried_again():
    costs, copied = PreemptionCosts(), 0
    for _ in range(LEAST + 1):
        costs.note_copies(1, 1.0)
        costs.note_forward(prompt_of(64), 0.64)
    asked = 6 * AGAIN
    for _ in range(asked):
        if costs.favours_copies(4, 256):
            costs.note_copies(4, 0.04)  # they take a hundredth now
            copied += 1
    assert 1 < copied < asked
    assert costs.favours_copies(4, 256)
    assert not costs.favours_copies(256, 4)


def test_chunks_that_draw_nothing_are_timed_on_the_cpu():
    batcher = ContinuousBatching(2, tiny_model("llama", "cpu"), prefill_chunk=8, overlap=False)
    batcher.submit([5, 9], max_tokens=9)
    batcher.step()
    batcher.submit([3] * 40, max_tokens=1)
    batcher.run()
    forwards = batcher._batch.scheduler.host.costs._forwards
    assert [count for _, count in forwards] == [2] + [8] * 5


def test_a_forward_that_decodes_tells_nothing():
    costs = PreemptionCosts()
    costs.note_copies(1, 0.0)
    for _ in range(LEAST):
        costs.note_copies(1, 1e9)
        costs.note_forward([row(), row()], 1e-9)
        costs.note_forward([row(), *prompt_of(1)], 1e-9)
    assert costs.favours_copies(1, 1)
    for _ in range(LEAST):
        costs.note_forward([row(), *prompt_of(2)], 1e-9)
    assert not costs.favours_copies(1, 1)


@pytest.mark.parametrize("copies_cost", [0.0, 1.0])
def test_a_scheduler_goes_by_it(copies_cost):
    blocks = BlockManager(9, PAGE, share_prefixes=False)
    world = World(Scheduler(blocks, 16, 4, 0.0, 9))
    costs = world.scheduler.host.costs
    for _ in range(LEAST + 1):
        costs.note_copies(1, copies_cost)
        costs.note_forward(prompt_of(10), 1.0)
    requests = [a_request(name, prompt_tokens=4, max_tokens=20) for name in range(4)]
    for one in requests:
        world.scheduler.add(one)
    run(world)
    assert sum(one.preemptions for one in requests) >= 1
    assert (world.swapped > 0) == (copies_cost == 0.0)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_batch_measures_both(device, monkeypatch, overlap):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", 4)
    options = {"num_blocks": 12, "num_host_blocks": 40, "share_prefixes": False}
    batcher = ContinuousBatching(5, tiny_model("llama", device), overlap=overlap, **options)
    batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some are preempted
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        batcher.submit(prompt, max_tokens=count)
        batcher.step()
    batcher.run()
    assert is_free(batcher)
    costs = batcher._batch.scheduler.host.costs
    assert costs is batcher._batch._host.costs is batcher._batch._runner.costs
    assert all(0 < one < 60 for one, _ in (*costs._copies, *costs._forwards))
    assert len(costs._forwards) >= LEAST
    # On a GPU the last copies may not be over when they are asked about.
    assert costs._copies or device.type == "cuda"


def test_a_stopwatch(device):
    watch = Stopwatch(torch.device(device))
    torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    watch.stop()
    watch.wait()
    assert watch.is_over()
    assert 0 < watch.seconds() < 60
