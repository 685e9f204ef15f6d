"""Drafts for a batch of one whose steps take what those of an H200 take: a stub of its clock."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
from families import tiny_model

from llamatelemetry.inference import speculation
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.launched import Launched
from llamatelemetry.inference.ngrams import NgramIndex
from llamatelemetry.inference.plan_runner import PlanRunner
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.inference.speculation_config import SpeculationConfig

# Seconds: of the GPU for a step and for one with drafts, of the host for each, of a capture.
STEP, VERIFY, HOST, VERIFY_HOST, CAPTURE = 4.4e-3, 4.7e-3, 0.5e-3, 1.5e-3, 0.2
FOUND, RIGHT = 0.64, 0.86  # as in benchmarks/bench_speculation.py
COUNT = 120


class Clock:
    """What the host and the GPU have done so far; patches the runner to count on it."""

    def __init__(self, monkeypatch):
        self.now = self.gpu = 0.0
        self.captured = set()
        launch, results, run = PlanRunner.launch, Launched.results, PlanRunner.run

        def timed_launch(runner, plan, before):
            launched = launch(runner, plan, before)
            self._take(HOST, STEP, "decode" if plan.pieces[0].is_decode else None)
            launched.due = self.gpu
            return launched

        def timed_results(launched):
            self.now = max(self.now, launched.due)
            return results(launched)

        def timed_run(runner, plan):
            is_draft = plan.has_drafts
            self._take(VERIFY_HOST, VERIFY if is_draft else STEP, is_draft or "decode")
            self.now = self.gpu
            yield from run(runner, plan)

        monkeypatch.setattr(PlanRunner, "launch", timed_launch)
        monkeypatch.setattr(Launched, "results", timed_results)
        monkeypatch.setattr(PlanRunner, "run", timed_run)
        fake = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(speculation, "time", fake)

    def _take(self, host, gpu, kind):
        """One forward. The first of a kind is captured, and its tokens are there at once."""
        self.now += host
        if kind is not None and kind not in self.captured:
            self.captured.add(kind)
            self.now = self.gpu = max(self.now, self.gpu) + CAPTURE
            return
        self.gpu = max(self.now, self.gpu) + gpu


def seconds(model, clock, config, rounds):
    """Of the clock, for a token of the last round; the handles of all rounds."""
    batcher = ContinuousBatching(1, model, overlap=True, speculation=config)
    clock.captured.clear()
    handles = []
    for _ in range(rounds):
        handles.append(batcher.submit([1, 5, 9], GREEDY, COUNT, ignore_eos=True))
        while not handles[-1].token_ids:
            batcher.step()
        begin, count = clock.now, len(handles[-1].token_ids)
        batcher.run()
    return (clock.now - begin) / (COUNT - count), handles


def test_a_batch_of_one_drafts_and_gains(monkeypatch):
    model = tiny_model("llama", torch.device("cpu"))
    clock = Clock(monkeypatch)
    plain, (_, wanted) = seconds(model, clock, None, 2)
    rng = random.Random(0)

    def propose(self, tokens, count):
        if rng.random() > FOUND:
            return []
        draft = wanted.token_ids[len(tokens) - 3 :][:count]
        return [token if rng.random() < RIGHT else token ^ 1 for token in draft]

    monkeypatch.setattr(NgramIndex, "propose", propose)
    drafted, handles = seconds(model, clock, SpeculationConfig(), 2)
    for handle in handles:  # in the first round too, in which steps are captured
        assert handle.token_ids == wanted.token_ids
        assert handle.stats.accepted_tokens > COUNT / 3
    assert plain / drafted > 1.6


def test_useless_drafts_of_a_batch_of_one_cost_little(monkeypatch):
    model = tiny_model("llama", torch.device("cpu"))
    clock = Clock(monkeypatch)
    plain, (_, wanted) = seconds(model, clock, None, 2)
    monkeypatch.setattr(
        NgramIndex,
        "propose",
        lambda self, tokens, count: [
            token ^ 1 for token in wanted.token_ids[len(tokens) - 3 :][:count]
        ],
    )
    drafted, handles = seconds(model, clock, SpeculationConfig(), 2)
    for handle in handles:
        assert handle.token_ids == wanted.token_ids
        assert handle.stats.accepted_tokens == 0
    assert drafted / plain < 1.1
