"""A process forked after a model was patched or run: a sentence, where torch itself would hang."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from families import tiny_model

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.embedding import Embedder
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models import forked
from llamatelemetry.models.patching import patch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
TOLD = "RuntimeError: this process was forked from one that had patched a model or run steps"
PROMPT = [5, 9, 2] * 20  # enough for both threads


def in_child(work):
    """What work gives in a forked process, as text; it has ten seconds."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            said = str(work())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writes, said.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def two_threads(monkeypatch):
    """And a process of which nothing is known yet."""
    monkeypatch.setattr(forked, "_has_run", False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def drawn(batcher):
    return batcher.submit(PROMPT, max_tokens=4).result().token_ids


def alone(generator):
    return [t for (t,) in generator.generate([PROMPT], [GREEDY], 4)]


def test_a_batch_after_its_own_steps(two_threads):
    batcher = ContinuousBatching(2, tiny_model("llama", "cpu"))
    want = drawn(batcher)

    def on_one_thread():
        torch.set_num_threads(1)
        return drawn(batcher)

    def drawn_again():
        handle = batcher.submit(PROMPT, max_tokens=4)
        with pytest.raises(RuntimeError, match=r"^this process was forked"):
            handle.result()
        return handle.result()

    for work in (lambda: drawn(batcher), drawn_again):
        assert in_child(work).startswith(TOLD)
    assert in_child(on_one_thread) == str(want)
    assert drawn(batcher) == want


def test_a_batch_that_was_made_and_has_run_no_step(two_threads):
    batcher = ContinuousBatching(2, tiny_model("llama", "cpu"))
    assert in_child(lambda: drawn(batcher)).startswith(TOLD)


@pytest.mark.filterwarnings("ignore:.*own forward")
@pytest.mark.parametrize("kind", ["batch", "packed", "own forward", "embedding", "another's patch"])
def test_a_patched_model(two_threads, kind):
    model = tiny_model("llama", "cpu")
    patch(model)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        model.generate(ids, max_new_tokens=4, do_sample=False)
    plain = TokenGenerator(model, "not packed")
    work = {
        "batch": lambda: drawn(ContinuousBatching(2, model)),
        "packed": lambda: alone(TokenGenerator(model)),
        "own forward": lambda: alone(plain),
        "embedding": lambda: Embedder(model).embed([PROMPT]),
        "another's patch": lambda: patch(tiny_model("llama", "cpu")),
    }
    assert in_child(work[kind]).startswith(TOLD)


@pytest.mark.filterwarnings("ignore:.*own forward")
def test_own_forwards_are_noted(two_threads):
    """The parent has patched nothing."""
    generator = TokenGenerator(tiny_model("llama", "cpu"), "not packed")
    want = alone(generator)
    assert in_child(lambda: alone(generator)).startswith(TOLD)
    assert alone(generator) == want
