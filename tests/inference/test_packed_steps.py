"""Prompts and those that decode in one forward: a GPU's steps, which a CPU takes here too."""

from __future__ import annotations

import pytest
import torch
from batching import COUNTS, PAGE, PROMPTS, WARM, alone, assert_text, is_free
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.runner import StepRunner


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)


def packing(model, rows=4, **options):
    batcher = ContinuousBatching(rows, model, **options)
    batcher._batch._runner.packs = True
    return batcher


def forwards_of(monkeypatch, batcher):
    """What is to become a list of the forwards of steps: tokens of each chunk, 1 for a row."""
    found, runner = [], batcher._batch._runner.runner
    prefill, draw = runner.prefill, runner.draw
    monkeypatch.setattr(
        runner,
        "prefill",
        lambda chunks, *rest, **more: (
            found.append([len(chunk.tokens) for chunk in chunks]),
            prefill(chunks, *rest, **more),
        )[1],
    )
    monkeypatch.setattr(
        runner, "draw", lambda *args, **more: (found.append([1]), draw(*args, **more))[1]
    )
    return found


# Halves and pairs; windows, softcaps and norms of q and k; positions that are no rotation.
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "opt"])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_text_is_that_of_each_alone(device, family, overlap):
    model = tiny_model(family, device)
    batcher = packing(model, overlap=overlap, prefill_chunk=6)
    handles = []
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        handles.append(batcher.submit(prompt, WARM, count))
        batcher.step()
        batcher.step()
    batcher.run()
    for prompt, count, handle in zip(PROMPTS, COUNTS, handles, strict=True):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, count, WARM))
    assert is_free(batcher)


@pytest.mark.parametrize("overlap", [False, True])
def test_one_forward_a_step_and_no_longer_chunks_than_asked_for(device, monkeypatch, overlap):
    batcher = packing(tiny_model("llama", device), overlap=overlap, prefill_chunk=7)
    forwards = forwards_of(monkeypatch, batcher)
    first = batcher.submit([5, 9], max_tokens=20)
    batcher.step()
    batcher.step()
    assert forwards == [[2], [1]]
    batcher.submit(list(range(3, 23)), max_tokens=4)
    batcher.submit([8, 8, 8], max_tokens=4)
    for _ in range(4):
        batcher.step()
    # A row's token ahead of the prompts; what is left of a chunk goes to the next prompt.
    assert forwards[2:] == [[1, 7], [1, 7], [1, 6, 1], [1, 1, 2]]
    assert [step.prompt_tokens for step in batcher.telemetry.steps][-4:] == [7, 7, 7, 2]
    batcher.run()
    assert len(first.token_ids) == 20
    assert is_free(batcher)


def test_rows_that_the_host_looks_at_are_packed_too(device, monkeypatch):
    model = tiny_model("llama", device)
    batcher = packing(model, overlap=True)
    forwards = forwards_of(monkeypatch, batcher)
    options = LogitOptions(logprobs=1)
    handles = [batcher.submit(p, WARM, 12, logits=options) for p in PROMPTS[:2]]
    batcher.step()
    handles.append(batcher.submit(PROMPTS[4], WARM, 12))
    batcher.step()
    assert forwards == [[3, 1], [1, 1, 7]]
    batcher.run()
    for prompt, handle in zip((*PROMPTS[:2], PROMPTS[4]), handles, strict=True):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, 12, WARM))
    assert [len(handle.logprobs) for handle in handles] == [12, 12, 0]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prompt_that_fails_ends_alone(device, monkeypatch, overlap):
    model = tiny_model("llama", device)
    batcher = packing(model, overlap=overlap)
    prefill = StepRunner.prefill

    def poisoned(self, chunks, width, **more):
        if any(96 in chunk.tokens for chunk in chunks):
            raise RuntimeError("poison")
        return prefill(self, chunks, width, **more)

    monkeypatch.setattr(StepRunner, "prefill", poisoned)
    handles = [batcher.submit(p, WARM, 15) for p in PROMPTS[:2]]
    for _ in range(3):
        batcher.step()
    bad = batcher.submit([3, 96, 4], max_tokens=8)
    with pytest.raises(RuntimeError, match="poison"):
        bad.result()
    batcher.run()
    for prompt, handle in zip(PROMPTS, handles, strict=False):
        assert_text(model, prompt, handle.token_ids, alone(model, prompt, 15, WARM))
    assert is_free(batcher)


def test_who_packs_and_refusals(device):
    model = tiny_model("llama", device)
    is_gpu = device.type == "cuda"
    assert ContinuousBatching(2, model)._batch._runner.packs == is_gpu
    assert not ContinuousBatching(2, model, split_size=64)._batch._runner.packs
    chunk = ContinuousBatching(2, model)._batch.scheduler.prefill_chunk
    assert chunk == (512 if is_gpu else 64)
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        ContinuousBatching(2, model, prefill_chunk=0)
    with pytest.raises(ValueError, match="prefill_chunk must be None with split_size"):
        ContinuousBatching(2, torch.nn.Linear(1, 1), split_size=64, prefill_chunk=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"prefill_chunk": 257},
            r"prefill_chunk must be at most max_step_tokens \(256\).* got 257",
        ),
        ({"prefill_chunk": 33, "max_step_tokens": 32}, r"max_step_tokens \(32\).* got 33"),
        (
            {"max_step_tokens": 7},
            "max_step_tokens must be at least 8 with max_batch_size 8.* got 7",
        ),
        ({"max_step_tokens": 8, "split_size": 64}, "must be at least 9 with max_batch_size 8"),
    ],
)
def test_a_step_has_room_for_what_is_asked(options, words):
    """It would do less than it is asked for, and nobody would know."""
    model = tiny_model("llama", "cpu")
    with pytest.raises(ValueError, match=f"^ContinuousBatching: .*{words}"):
        ContinuousBatching(8, model, **options)
    small = ContinuousBatching(8, model, max_step_tokens=16)  # less than the default chunk
    assert len(small.submit(list(range(3, 43)), max_tokens=3).result().token_ids) == 3
    ContinuousBatching(8, model, max_step_tokens=16, prefill_chunk=16)
