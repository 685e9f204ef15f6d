"""The parameters of sampling: validation, and a batch of them as tensors."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry.inference.sampling import SamplingParams, sampling_tensors


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            {"temperature": -0.5},
            "temperature must be finite and at least 0 (0 is greedy), got -0.5",
        ),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be at least 0 (0 keeps all), got -1"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1] (1 keeps all), got 0.0"),
        ({"top_p": 1.5}, "top_p must lie in (0, 1]"),
        ({"min_p": -0.1}, "min_p must lie in [0, 1] (0 keeps all), got -0.1"),
        ({"seed": 2**63}, "seed must fit in 64 bits"),
    ],
)
def test_refusals(wrong, sentence):
    with pytest.raises(ValueError, match="SamplingParams: ") as caught:
        SamplingParams(**wrong)
    assert sentence in str(caught.value)


def test_tensors_hold_a_row_each():
    tensors = sampling_tensors(
        [SamplingParams(0.5, 40, 0.9, 0.05, 2**62), SamplingParams(0)], "cpu"
    )
    assert tensors.temperature.tolist() == [0.5, 0.0]
    assert tensors.top_k.tolist() == [40, 0]
    assert tensors.top_p.tolist() == pytest.approx([0.9, 1.0])
    assert tensors.min_p.tolist() == pytest.approx([0.05, 0.0])
    assert tensors.seed.tolist() == [2**62, 0]
    assert [t.dtype for t in (tensors.temperature, tensors.top_k, tensors.seed)] == [
        torch.float32,
        torch.int32,
        torch.int64,
    ]
