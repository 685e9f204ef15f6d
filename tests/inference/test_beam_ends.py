"""How searches of beams end: at stop ids that are among the tokens which beams draw."""

from __future__ import annotations

import time

import pytest
from batching import PROMPTS
from test_beams import _small_pages, models, run, searched, submitted, texts  # noqa: F401

from llamatelemetry.inference.beam_search import MAX_LENGTH_PENALTY, BeamParams, BeamSearch
from llamatelemetry.inference.continuous import ContinuousBatching


@pytest.mark.parametrize(
    "search",  # num_beams, length_penalty, early_stopping, min_tokens, max_tokens, answers
    [
        (3, 1.0, False, 0, 14, 3),
        (3, 1.0, True, 4, 14, 2),
        (4, 2.0, "never", 4, 12, 1),
        (3, 2.0, "never", 0, 14, 3),
        (2, 0.0, False, 0, 9, 1),
        (4, -1.0, False, 0, 6, 4),
    ],
)
def test_the_answers_are_those_of_generate(device, models, search):  # noqa: F811
    model, (beams, penalty, early, least, most, count) = models(device), search
    ended = 0
    for prompt in PROMPTS:
        plain = searched(model, prompt, (beams, penalty, early, (), 0, most, beams))
        stops = tuple({row[i] for row in plain for i in (1, 3, 5) if i < len(row)})
        asked = (beams, penalty, early, stops, least, most, count)
        wanted = searched(model, prompt, asked)
        ended += sum(row[-1] in stops for row in wanted)
        batcher = ContinuousBatching(4, model)
        group = submitted(batcher, prompt, asked)
        run(batcher)
        assert texts([group]) == [wanted]
        for handle in group:
            reason = "stop" if handle.token_ids[-1] in stops else "length"
            assert handle.result().finish_reason == reason
    assert ended  # else nothing here was of how they end


def test_scores_of_the_longest_answers_are_floats():
    search = BeamSearch(BeamParams(1, MAX_LENGTH_PENALTY, "never"), 2**31 - 1, stop_ids=(7,))
    assert search.step([[(7, -0.5), (1, -1.0)]]) == [0]
    assert search.beams == [[1]]
    assert search.answers == [(-0.5, [7])]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_limit_of_waiting_is_over_once_a_forward_began(device, models, beams):  # noqa: F811
    """Of all answers to a prompt whose chunks take longer."""
    batcher = ContinuousBatching(4, models(device), max_step_tokens=4)
    batcher.submit([1, 2], max_tokens=2).result()  # what is compiled or recorded once
    asked = {"num_beams": 2} if beams == 2 else {}
    group = batcher.submit_group(
        list(range(3, 60)), [None] * 2, max_tokens=4, wait_limit_s=0.2, **asked
    )
    batcher.step()
    time.sleep(0.25)
    assert all(len(handle.result().token_ids) == 4 for handle in group)


def test_telemetry_counts_who_makes_way(device, models):  # noqa: F811
    batcher = ContinuousBatching(4, models(device))
    groups = [batcher.submit_group(one, [None] * 3, 14, num_beams=3) for one in PROMPTS[:4]]
    run(batcher)
    taken = sum(one.request.preemptions for group in groups for one in group[0].together)
    assert 0 < taken == batcher.telemetry.summary()["preemptions"]
