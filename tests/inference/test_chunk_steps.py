"""Prompts beside those that decode in a forward that is captured: the same text."""

from __future__ import annotations

import pytest
import torch
from batching import COUNTS, PAGE, PROMPTS, WARM, alone, assert_text, is_free
from families import tiny_model

from llamatelemetry.inference import chunk_steps, running_batch
from llamatelemetry.inference.chunk_step import ChunkStep
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import GREEDY, SamplingParams, sampling_tensors
from llamatelemetry.inference.step import Chunk
from llamatelemetry.inference.step_tensors import StepTensors
from llamatelemetry.models.patching import patch


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)
    monkeypatch.setattr(chunk_steps, "WORTH", 0)
    monkeypatch.setattr(chunk_steps, "TOKENS", (4, 8))


@pytest.fixture
def ran(monkeypatch):
    """(rows, tokens, prompts) of each run of a ChunkStep."""
    found, place = [], ChunkStep.place

    def noted(self, rows, prompts, *rest):
        place(self, rows, prompts, *rest)
        found.append((len(rows), sum(len(one.tokens) for one in prompts), len(prompts)))

    monkeypatch.setattr(ChunkStep, "place", noted)
    return found


def packing(model, rows=4, **options):
    batcher = ContinuousBatching(rows, model, overlap=True, **options)
    runner = batcher._batch._runner
    runner.packs = runner.chunk_steps.is_on = True
    return batcher


def serve(batcher, **options):
    handles = []
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        handles.append(batcher.submit(prompt, WARM, count, **options))
        batcher.step()
        batcher.step()
    batcher.run()
    return handles


# Halves and pairs; windows, softcaps and norms of q and k; positions that are no rotation.
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "opt"])
def test_the_text_is_that_of_each_alone(device, ran, family):
    model = tiny_model(family, device)
    if family == "gpt_oss":
        assert not ContinuousBatching(2, model)._batch._runner.chunk_steps.is_on  # experts
        return
    batcher = packing(model, prefill_chunk=6)
    handles = serve(batcher)
    for prompt, count, handle in zip(PROMPTS, COUNTS, handles, strict=True):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, count, WARM))
    assert is_free(batcher)
    assert len(ran) >= 6
    assert {1, 2} <= {prompts for *_, prompts in ran}  # a chunk's rest goes to the next prompt
    if device.type == "cuda":
        steps = batcher._batch._runner.runner.steps()
        assert {step.mode for step in steps if isinstance(step, ChunkStep)} == {"graph"}


def test_what_comes_seldom_is_not_captured(monkeypatch, device, ran):
    monkeypatch.setattr(chunk_steps, "WORTH", 2)
    batcher = packing(tiny_model("llama", device), prefill_chunk=4)
    batcher.submit([5, 9], max_tokens=40)
    batcher.step()
    late = batcher.submit(list(range(3, 23)), max_tokens=2)  # five chunks
    batcher.run()
    assert ran == [(1, 4, 1)] * 3
    assert len(late.token_ids) == 2


def test_more_prompts_and_tokens_than_there_is_a_step_for(device, ran):
    model = tiny_model("llama", device)
    batcher = packing(model, 8)
    handles = [batcher.submit([5, 9], WARM, 30)]
    batcher.step()
    handles += [batcher.submit([7 + i], WARM, 6) for i in range(5)]
    batcher.step()
    handles.append(batcher.submit(list(range(2, 13)), WARM, 6))
    batcher.step()
    assert ran == []
    batcher.run()
    for handle in handles:
        prompt, count = handle.request.prompt, handle.request.max_tokens
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, count, WARM))


def test_logits_of_nan_end_their_request_alone(device, monkeypatch, ran):
    model = tiny_model("llama", device)
    batcher = packing(model)
    forward = ChunkStep._run_forward

    def damaged(self):
        forward(self)
        self.logits[self._batch, 5].fill_(torch.nan)  # of the first prompt; no copy to capture

    monkeypatch.setattr(ChunkStep, "_run_forward", damaged)
    first = batcher.submit(PROMPTS[0], WARM, 20)
    batcher.step()
    bad = batcher.submit([3, 9, 4], max_tokens=8)
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        bad.result()
    assert ran == [(1, 3, 1)]
    assert_text(model, PROMPTS[0], first.result().token_ids, alone(model, PROMPTS[0], 20, WARM))
    assert is_free(batcher)


def test_a_capture_that_fails_is_said_once_and_loses_nothing(device, monkeypatch, ran, caplog):
    model = tiny_model("llama", device)
    batcher = packing(model)

    def failing(self):
        raise torch.OutOfMemoryError("no room for a graph")

    monkeypatch.setattr(ChunkStep, "_run_eagerly", failing)
    monkeypatch.setattr(ChunkStep, "_record", failing)
    with caplog.at_level("WARNING", "llamatelemetry"):
        handles = serve(batcher)
    assert [r.message for r in caplog.records] == [
        "prompts beside those that decode run without a graph: no room for a graph"
    ]
    assert len(ran) == 1
    assert not batcher._batch._runner.chunk_steps.is_on
    for prompt, count, handle in zip(PROMPTS, COUNTS, handles, strict=True):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, count, WARM))


def test_what_the_host_looks_at_runs_by_itself(device, ran):
    batcher = packing(tiny_model("llama", device))
    handles = serve(batcher, logits=LogitOptions(logprobs=1))
    assert ran == []
    assert [len(handle.logprobs) for handle in handles] == COUNTS


def test_a_dropped_step_names_all_that_a_replay_reads(device):
    model = tiny_model("llama", device)
    patch(model)
    runner = StepRunner(model)
    runner.ready(128, 8, keep=False)
    step = runner.step_of(ChunkStep, 8, 2, 64)
    held = {one.untyped_storage().data_ptr() for one in step.buffers()}
    parts = [one for *_, part in step.input.parts for one in vars(part).values()]
    read = [one for one in parts if isinstance(one, torch.Tensor)]
    assert read
    assert {one.untyped_storage().data_ptr() for one in read} <= held


def test_what_is_put_in_a_steps_tensors(device):
    tensors = StepTensors(2, 2, 1, 2, torch.device(device))
    rows, warm = [Chunk([1], 0, [0]), Chunk([2], 0, [1])], [SamplingParams(temperature=0.5)] * 2
    tensors.place(rows, [True] * 2, warm, [0, 0], 4)
    tensors.copy_sampling_(sampling_tensors([GREEDY] * 2, torch.device(device)))
    tensors.place(rows, [True] * 2, warm, [0, 0], 4)
    assert tensors.sampling.temperature.tolist() == [0.5, 0.5]
    with pytest.raises(AssertionError):
        tensors.place(rows, [True] * 2, warm, [0], 4)  # would move what lies behind
