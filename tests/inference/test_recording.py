"""Recordings: what a replay computes, what it refuses, and that threads agree on the order."""

from __future__ import annotations

import time

import pytest
import torch
from op_checks import assert_refuses

from llamatelemetry.inference.recording import Recording, RecordingError
from llamatelemetry.ops import rms_norm


def chain(x, weight, steps):
    for _ in range(steps):
        x = rms_norm(x, weight)
    return x


def record(body):
    with Recording() as recording:
        body()
    return recording


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 4096])
def test_replay_of_a_dependent_chain_equals_eager(num_tokens):
    weight = torch.rand(96) + 0.5
    x = torch.randn(num_tokens, 96)
    with Recording() as recording:
        out = chain(x, weight, 50)
    assert recording.num_launches == 50
    assert torch.equal(out, chain(x, weight, 50))
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        out.fill_(torch.nan)
        recording.replay()
        assert torch.equal(out, chain(x, weight, 50))


def test_a_profile_names_every_launch_and_adds_up_to_the_replay():
    x, weight = torch.randn(4096, 96), torch.ones(96)
    with Recording() as recording:
        out = chain(x, weight, 30)
    x.copy_(torch.randn_like(x))
    start = time.perf_counter()
    launches = recording.profile()
    wall_us = (time.perf_counter() - start) * 1e6
    assert [name for name, _ in launches] == ["rms_norm"] * 30
    assert all(us >= 0 for _, us in launches)
    assert 0 < sum(us for _, us in launches) <= wall_us
    assert torch.equal(out, chain(x, weight, 30))


def test_replay_keeps_what_the_ops_allocated():
    x, weight = torch.randn(8, 256), torch.ones(256)
    with Recording() as recording:
        out = chain(x, weight, 3)
    junk = [torch.full((8, 256), torch.nan) for _ in range(64)]  # would land in freed buffers
    recording.replay()
    assert torch.equal(out, chain(x, weight, 3))
    del junk


def test_replay_on_one_thread_of_what_two_recorded(set_threads):
    x, weight = torch.randn(4096, 96), torch.ones(96)
    set_threads(2)
    with Recording() as recording:
        out = chain(x, weight, 10)
    set_threads(1)
    out.fill_(torch.nan)
    recording.replay()
    assert torch.equal(out, chain(x, weight, 10))


def test_refusals():
    x, weight = torch.randn(2, 8), torch.ones(8)
    for foreign in (lambda: x + 1, lambda: x.copy_(x), lambda: torch.zeros(2), lambda: x[:, [0]]):
        assert_refuses(lambda f=foreign: record(f), "Recording: every op must be", "aten")
    assert_refuses(lambda: record(lambda: record(lambda: None)), "must not be inside another")
    assert_refuses(lambda: Recording().replay(), "nothing is recorded yet")
    closed = record(lambda: rms_norm(x, weight))
    closed.close()
    assert_refuses(closed.replay, "nothing is recorded yet, or it was closed")
    record(
        lambda: rms_norm(x, weight)[:, :4].view(2, 2, 2)
    ).replay()  # after refusals it still works


def test_a_copy_that_calls_itself_a_view_is_refused():
    x = torch.randn(4, 96)
    for copies in (lambda: x.t().contiguous(), lambda: x.t().reshape(-1)):
        # In inference mode they reach the recording whole.
        with torch.inference_mode(), pytest.raises(RecordingError, match="got aten"):
            record(copies)
    record(lambda: x.contiguous().reshape(-1))
