"""How long drafts become, against steps whose times and drafts' chances are given."""

from __future__ import annotations

import random

import pytest

from llamatelemetry.inference.draft_lengths import DraftLengths
from llamatelemetry.inference.scheduled_request import ScheduledRequest

STEPS = 600


def served(chance, extra, slope, rows=1, overlap=False, seed=0):
    """Tokens a second beside a batch that drafts nothing, and the mean length of drafts.

    Args:
        chance: that a drafted token is right, by step.
        extra, slope: of a step with drafts: it takes 1 + extra + slope * drafted; with overlap a
            step before which nothing may be launched takes 1 + extra in any case.
    """
    rng, lengths = random.Random(seed), DraftLengths()
    requests = [ScheduledRequest(i, [1], STEPS) for i in range(rows)]
    tokens, seconds, drafted = 0, 0.0, 0
    for at in range(STEPS):
        counts, accepted = [0] * rows, 0
        due = not lengths.rests(rows)
        if due:
            counts = lengths.choose([(one, 4) for one in requests], rows)
        for request, count in zip(requests, counts, strict=True):
            if count:
                right = 0
                while right < count and rng.random() < chance(at):
                    right += 1
                lengths.note_draft(request, count, right)
                accepted += right
        if due:
            lengths.note_step(rows, accepted, overlap)
        took = 1 + (extra if sum(counts) or (due and overlap) else 0) + slope * sum(counts)
        if sum(counts) or not (due and overlap):
            held_up = {0: 60, 1: 0.2}.get(at) or (
                5 if rng.random() < 0.02 else 1
            )  # a capture first
            lengths.note_time(rows, sum(counts), took * rng.uniform(0.95, 1.1) * held_up)
        tokens, seconds, drafted = tokens + rows + accepted, seconds + took, drafted + sum(counts)
    return tokens / seconds / rows, drafted / STEPS / rows


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize(("extra", "slope"), [(0.1, 0.01), (0.05, 0.3)])
def test_useless_drafts_cost_little(extra, slope, rows, overlap):
    rate, _ = served(lambda at: 0.02, extra, slope / rows, rows, overlap)
    assert rate > 0.95


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_right_drafts_are_long_where_a_step_s_time_allows(rows, overlap):
    rate, length = served(lambda at: 0.9, 0.1, 0.02 / rows, rows, overlap)
    assert length > 3
    assert rate > 2.5
    rate, length = served(lambda at: 0.5, 0.05, 0.4 / rows, rows, overlap)
    assert length < 1.5
    assert rate > 0.95


def test_drafts_come_back_when_they_become_right():
    rate, _ = served(lambda at: 0.9 if at >= STEPS // 2 else 0.0, 0.1, 0.02, overlap=True)
    assert rate > 1.6


def test_rows_have_lengths_of_their_own():
    lengths = DraftLengths()
    good, bad = (ScheduledRequest(name, [1], 9) for name in range(2))
    for _ in range(40):
        lengths.note_draft(good, 4, 4)
        lengths.note_draft(bad, 4, 0)
    assert lengths.choose([(bad, 4), (good, 4)], 2) == [0, 4]


def test_any_numbers_of_rows_may_follow_one_another():
    lengths, request = DraftLengths(), ScheduledRequest(0, [1], 99)
    for rows in range(1, 700):  # each learns from the one before
        assert lengths.rests(rows)
    while lengths.rests(699):
        pass
    assert lengths.choose([(request, 4)] * 699, 699) == [4] * 699


def test_a_step_with_prompts_is_not_waited_for():
    lengths = DraftLengths()
    assert not lengths.rests(3, is_mixed=True)
    assert [lengths.rests(3) for _ in range(9)] == [True] * 8 + [False]
