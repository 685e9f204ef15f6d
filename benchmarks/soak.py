"""A soak: many requests of random shape, cancelled at random, and what is left behind after them.

Run as a script it serves 10,000 requests of a tiny random model from several threads and prints
blocks, open requests, threads, file handles and memory before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import sys
import threading
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.logit_options import LogitOptions
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.sampling import SamplingParams

VOCAB, CONTEXT = 97, 256
MOST_OPEN = 48
WARM_UP = 300  # requests before anything is counted: recordings are made, pools filled


@dataclass(frozen=True)
class Left:
    """What a process holds when no request is open."""

    open_requests: int
    used_blocks: int
    threads: int
    file_handles: int
    memory_mib: float


@dataclass(frozen=True)
class Report:
    """Before and after a soak, and how its requests ended."""

    before: Left
    after: Left
    ends: dict[str, int]
    preemptions: int


def tiny_batcher(**options: Any) -> ContinuousBatching:
    """Over a random model, with fewer blocks than its requests would like."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    sizes = {"num_blocks": 12, "num_host_blocks": 6, "max_step_tokens": 64}
    return ContinuousBatching(8, model, **sizes | options)


def submit(batcher: ContinuousBatching, rng: random.Random) -> list[RequestHandle]:
    """One request, or a group, of random shape; every third prompt begins as others do."""
    length = rng.choice((1, 3, 10, 40, 100, 150))
    ids = [rng.randrange(VOCAB) for _ in range(length)]
    if rng.random() < 0.3:
        ids = (list(range(64)) + ids)[:150]
    count = rng.choice((1, 1, 1, 1, 2, 3))
    params = [
        SamplingParams(temperature=rng.choice((0.0, 1.0)), seed=rng.randrange(99), top_k=20)
        for _ in range(count)
    ]
    logits = None
    if rng.random() < 0.2:
        logits = LogitOptions(presence_penalty=0.5, logprobs=rng.choice((None, 2)))
    return batcher.submit_group(
        ids,
        params,
        rng.choice((1, 2, 5, 20, 60)),
        stop_token_ids=range(12) if rng.random() < 0.5 else (),
        priority=rng.choice((0, 0, 1)),
        logits=logits,
        time_limit_s=1e-4 if rng.random() < 0.02 else None,
    )


def serve(batcher: ContinuousBatching, count: int, seed: int) -> tuple[dict[str, int], int]:
    """Serves requests from three threads; returns how they ended, and preemptions."""
    ends: dict[str, int] = {}
    preemptions, lock = [0], threading.Lock()

    def work(part: int) -> None:
        rng = random.Random(seed * 1000 + part)
        left, opened = count // 3, []
        while left > 0 or opened:
            while left > 0 and len(opened) < MOST_OPEN // 3:
                group = submit(batcher, rng)
                opened += group
                left -= len(group)
            if rng.random() < 0.5:
                rng.choice(opened).cancel()
            if rng.random() < 0.2:
                with contextlib.suppress(CancelledError, TimeoutError):
                    rng.choice(opened).result(timeout=0.05)
            else:
                batcher.step()
            with lock:
                for handle in [one for one in opened if one.done()]:
                    reason = str(handle.request.finish_reason)
                    ends[reason] = ends.get(reason, 0) + 1
                    preemptions[0] += handle.stats.preemptions
            opened = [one for one in opened if not one.done()]

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends, preemptions[0]


def left(batcher: ContinuousBatching) -> Left:
    """What is held now; walks the scheduler's invariants."""
    gc.collect()
    assert batcher._batch is not None
    scheduler, process = batcher._batch.scheduler, psutil.Process()
    scheduler.check()
    return Left(
        len(batcher._batch.open) + len(scheduler.running) + len(scheduler.waiting),
        scheduler.blocks.num_blocks - scheduler.blocks.num_available,
        threading.active_count(),
        process.num_fds() if sys.platform != "win32" else process.num_handles(),
        round(process.memory_info().rss / 2**20, 1),
    )


def soak(batcher: ContinuousBatching, count: int, warm_up: int = WARM_UP) -> Report:
    """Serves count requests after a warm-up."""
    serve(batcher, warm_up, seed=0)
    before = left(batcher)
    ends, preemptions = serve(batcher, count, seed=1)
    return Report(before, left(batcher), ends, preemptions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    print(json.dumps(asdict(soak(tiny_batcher(), parser.parse_args().requests)), indent=2))
