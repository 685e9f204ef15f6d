"""TTFT, TPOT, rates and percentiles are what their definitions say."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamatelemetry.profiling import (
    RequestTimes,
    percentile,
    percentiles,
    summarise,
    time_per_output_token,
    time_to_first_token,
)

ONE = RequestTimes(1.0, 1.5, 3.5, 5.5, num_prompt_tokens=100, num_tokens=9)


def test_definitions():
    assert time_to_first_token(1.0, 3.5) == ONE.ttft == 2.5
    assert time_per_output_token(3.5, 5.5, 9) == ONE.tpot == 0.25
    assert ONE.queue_delay == 0.5
    assert ONE.prefill_tokens_per_second == 50.0
    assert ONE.decode_tokens_per_second == 4.0


def test_a_single_token_has_no_time_between_tokens():
    single = RequestTimes(0.0, 0.0, 1.0, 1.0, 10, 1)
    assert math.isnan(single.tpot)
    assert math.isnan(single.decode_tokens_per_second)
    assert single.ttft == 1.0
    assert math.isnan(time_per_output_token(1.0, 1.0, 0))


def test_times_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"time_to_first_token: first_token must not be before 2"):
        time_to_first_token(2.0, 1.0)
    with pytest.raises(ValueError, match="last_token must not be before"):
        time_per_output_token(2.0, 1.0, 3)
    with pytest.raises(ValueError, match="queue_delay: started"):
        RequestTimes(1.0, 0.5, 2.0, 3.0, 1, 2).queue_delay  # noqa: B018
    with pytest.raises(ValueError, match="q must be between 0 and 100, got 101"):
        percentile([1.0], 101)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.one_of(st.floats(0, 100), st.sampled_from([0, 50, 95, 99, 100])),
)
def test_percentile_is_numpys(values, q):
    assert percentile(values, q) == pytest.approx(numpy.percentile(values, q), abs=1e-6)


def test_percentiles_of_little():
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 2.9, "p99": 2.98}
    assert percentiles([math.nan, 1.0], [50, 99.9]) == {"p50": 1.0, "p99.9": 1.0}
    assert math.isnan(percentile([], 50))
    assert percentile([1.0, math.inf], 100) == math.inf


def test_summary():
    slow = RequestTimes(0.0, 3.0, 4.5, 4.5, 100, 1)
    summary = summarise([ONE, slow])
    assert summary["ttft"]["p50"] == 3.5
    assert summary["tpot"]["p99"] == 0.25  # the single token has none
    assert set(summary) == {
        "ttft",
        "tpot",
        "queue_delay",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }
