"""The options of serve that say how requests share the steps and the cache."""

from __future__ import annotations

import argparse

import pytest

from llamatelemetry.cli import batching
from llamatelemetry.cli.main import main

GIVEN = ["--prefill-chunk", "48", "--num-blocks", "9", "--num-host-blocks", "4"]


def parsed(*words):
    parser = argparse.ArgumentParser()
    batching.add_batch_options(parser)
    return parser.parse_args([*words])


def test_they_are_those_of_the_batch():
    nothing = {"prefill_chunk": None, "num_blocks": None, "num_host_blocks": 0}
    assert batching.batch_options(parsed()) == nothing
    wanted = {"prefill_chunk": 48, "num_blocks": 9, "num_host_blocks": 4}
    assert batching.batch_options(parsed(*GIVEN)) == wanted
    from llamatelemetry.inference import ContinuousBatching

    ContinuousBatching(2, **wanted)  # takes them all


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prefill-chunk", "0"], "--prefill-chunk must be at least 1, got 0"),
        (["--num-blocks", "0"], "--num-blocks must be at least 1, got 0"),
        (["--num-host-blocks", "-1"], "--num-host-blocks must be at least 0, got -1"),
        (["--max-batch-size", "0"], "--max-batch-size must be at least 1, got 0"),
    ],
)
def test_refusals(capsys, words, sentence):
    assert main(["serve", "smollm2", *words]) == 2
    assert capsys.readouterr().err == f"llamatelemetry: {sentence}\n"


def test_a_chunk_is_no_larger_than_a_step(capsys):
    """Refused before the model is looked for, by the command's own name."""
    pytest.importorskip("fastapi")
    words = ["--device", "cpu", "--prefill-chunk", "257"]
    assert main(["serve", "no/such/model", *words]) == 2
    sentence = "--prefill-chunk must be at most 256, the tokens of a step on cpu, got 257"
    assert capsys.readouterr().err == f"llamatelemetry: {sentence}\n"
