"""The scheduler with a fake model: budgets, blocks, order, and texts that nothing changes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import END, PAGE, VOCAB, World, a_request, alone, make, run

from llamatelemetry.inference import scheduler as module
from llamatelemetry.inference.block_manager import BlockManager, OutOfBlocks
from llamatelemetry.inference.scheduled_request import ScheduledRequest
from llamatelemetry.inference.scheduler import Scheduler

REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.one_of(
                st.integers(1, 14).map(lambda count: [1] * count),  # prefixes to be shared
                st.lists(st.integers(0, 1), min_size=1, max_size=14),
            ),
            "max_tokens": st.integers(1, 12),
            "min_tokens": st.integers(0, 5),
            "stop_ids": st.sampled_from([(), (END,), (0, END)]),
            "priority": st.integers(0, 2),
            "comes": st.integers(0, 20),  # at this step
            "goes": st.one_of(st.none(), st.integers(0, 40)),  # cancelled at this step
        }
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=400)
@given(
    wanted=REQUESTS,
    num_blocks=st.integers(9, 20),
    budget=st.integers(4, 20),
    max_running=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    sharing=st.booleans(),
    preempted=st.sets(st.integers(0, 60)),
    failed=st.sets(st.integers(0, 60)),
    num_host_blocks=st.sampled_from([0, 3, 20]),
)
def test_any_schedule_gives_the_same_texts(
    wanted, num_blocks, budget, max_running, share, sharing, preempted, failed, num_host_blocks
):
    blocks = BlockManager(num_blocks, PAGE, share_prefixes=sharing)
    world = World(Scheduler(blocks, budget, max_running, share, num_host_blocks))
    scheduler = world.scheduler
    requests = [
        ScheduledRequest(
            name=i, arrival=i, **{k: v for k, v in one.items() if k not in ("comes", "goes")}
        )
        for i, one in enumerate(wanted)
    ]
    # Were each alone, with every step lost that the fuzz takes away.
    most = sum(request.most_tokens for request in requests) + 62 * 15
    for step in range(most):
        for request, one in zip(requests, wanted, strict=True):
            if one["comes"] == step:
                scheduler.add(request)
            if one["goes"] == step and one["comes"] < step and request.finish_reason is None:
                scheduler.end(request, "cancelled")
        if step in preempted and scheduler.running:
            scheduler.preempt(scheduler.running[-1])
        world.step({request.name for request in scheduler.running} if step in failed else ())
        if step > 20 and not scheduler.running and not scheduler.waiting:
            break
    assert not scheduler.running
    assert not scheduler.waiting
    assert blocks.num_available == blocks.num_blocks
    assert scheduler.host.num_available == num_host_blocks
    for request, one in zip(requests, wanted, strict=True):
        drawn = request.tokens[len(one["prompt"]) :]
        whole = alone(one["prompt"], one["max_tokens"], one["min_tokens"], one["stop_ids"])
        if request.finish_reason == "cancelled":
            assert drawn == whole[: len(drawn)]
        else:
            assert drawn == whole
            ends = drawn[-1] in one["stop_ids"] and len(drawn) > one["min_tokens"]
            assert request.finish_reason == ("stop" if ends else "length")


def test_priority_then_arrival_decides_who_starts():
    world = make(max_running=1)
    for name, priority in enumerate([1, 0, 1, 0]):
        world.scheduler.add(a_request(name, priority=priority))
    run(world)
    assert world.started == [1, 3, 0, 2]


def test_a_long_prompt_is_cut_and_nobody_waits_for_it():
    world = make(budget=6, max_running=2)
    world.scheduler.add(a_request(0, max_tokens=9))
    world.step()
    world.scheduler.add(a_request(1, prompt_tokens=14))
    sizes = []
    while world.scheduler.running:
        plan = world.step()
        sizes.append([(p.request.name, p.end - p.begin, p.draws) for p in plan.pieces])
    assert sizes[:4] == [
        [(0, 1, True), (1, 5, False)],
        [(0, 1, True), (1, 5, False)],
        [(0, 1, True), (1, 4, True)],
        [(0, 1, True), (1, 1, True)],
    ]


def test_no_preemption_where_every_request_may_become_as_long_as_it_says():
    world = make(num_blocks=10, budget=16, max_running=4)
    for name in range(6):
        world.scheduler.add(a_request(name, prompt_tokens=4, max_tokens=10))
    plans = run(world)
    assert not any(plan.preempted for plan in plans)
    assert max(len(plan.pieces) for plan in plans) == 2


def test_after_a_preemption_no_other_follows():
    world = make(num_blocks=9, budget=16, max_running=4, expected_share=0.0)
    requests = [a_request(name, prompt_tokens=4, max_tokens=20) for name in range(4)]
    for one in requests:
        world.scheduler.add(one)
    plans = run(world)
    assert 1 <= sum(len(plan.preempted) for plan in plans) <= 3
    assert requests[0].preemptions == 0
    for one in requests:
        assert one.tokens[4:] == alone(one.prompt, 20, 0, ())


def test_the_latest_lowest_gives_way():
    world = make(num_blocks=9, budget=16, max_running=3, expected_share=0.0)
    priorities = [1, 0, 1]
    requests = [
        a_request(n, prompt_tokens=6, max_tokens=6, priority=p) for n, p in enumerate(priorities)
    ]
    for one in requests:
        world.scheduler.add(one)
    first = next(plan.preempted for plan in iter(world.step, None) if plan.preempted)
    assert first[0] is requests[2]
    run(world)
    assert requests[1].preemptions == 0


def test_a_prefix_is_computed_once():
    world = make()
    first, second = (ScheduledRequest(n, [1] * 10, 3, arrival=n) for n in range(2))
    world.scheduler.add(first)
    world.step()
    world.scheduler.add(second)
    plan = world.step()
    assert (first.num_cached, second.num_cached) == (0, 9)
    assert [(p.request.name, p.begin, p.end) for p in plan.pieces] == [(0, 10, 11), (1, 9, 10)]


def test_stop_strings_end_a_request():
    class Text:
        stopped = False

        def push(self, token):
            self.stopped = token == 2
            return f"<{token}>"

    one = ScheduledRequest(0, [1], 9, text=Text())
    assert [one.take(token) for token in (0, 2)] == ["<0>", "<2>"]
    assert one.finish_reason == "stop"


def test_expectations_follow_what_requests_use():
    world = make()
    world.scheduler.add(a_request(0, max_tokens=10, stop_ids=range(VOCAB)))
    run(world)
    assert world.scheduler.expected_share == pytest.approx(1 + module.SHARE_RATE * (0.1 - 1))


def test_refusals():
    blocks = BlockManager(4, PAGE)
    for options, sentence in [
        ((8, 0), "max_running must be at least 1, got 0"),
        ((3, 4), r"max_step_tokens must be at least max_running \(4\).*got 3"),
        ((8, 4, 1.5), r"expected_share must lie in \[0, 1\], got 1.5"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            Scheduler(blocks, *options)
    scheduler = Scheduler(blocks, 8, 4)
    with pytest.raises(OutOfBlocks, match="need 5 blocks of 3 tokens, the whole cache has 4"):
        scheduler.add(a_request(0, prompt_tokens=6, max_tokens=7))
    assert not scheduler.waiting


def test_broken_invariants_are_named():
    world = make()
    world.scheduler.add(a_request(0))
    world.step()
    world.scheduler.running[0].num_computed = len(world.scheduler.running[0].tokens)
    world.scheduler.waiting += [a_request(2), a_request(1)]
    with pytest.raises(RuntimeError, match="both queues are in order; at least one token"):
        world.scheduler.check()


def test_it_loads_no_torch():
    code = "import sys, llamatelemetry.inference.scheduler; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
