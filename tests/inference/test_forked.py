"""A process that was forked after steps were run: a sentence, where torch itself would hang."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from families import tiny_model

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
WAY_OUT = "start it by multiprocessing's spawn"


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
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_forked_process_is_told(two_threads):
    model = tiny_model("llama", "cpu")
    batcher = ContinuousBatching(2, model)
    want = batcher.submit([5, 9, 2], max_tokens=4).result().token_ids

    def batch():
        return batcher.submit([5, 9, 2], max_tokens=4).result().token_ids

    def alone():
        return [t for (t,) in TokenGenerator(model).generate([[5, 9, 2]], [GREEDY], 4)]

    def on_one_thread():
        torch.set_num_threads(1)
        return batch()

    for work in (batch, alone):
        assert WAY_OUT in in_child(work)
    assert in_child(on_one_thread) == str(want)
    assert batch() == want
