"""A soak: many requests of random shape, cancelled at random, and what is left behind after them.

Run as a script it serves requests of a tiny random model from several threads, for two minutes, and
prints blocks, open requests, threads, file handles and memory before and after: single ones, groups
and beams, with drafts and without, that give their blocks up and have them swapped.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import sys
import threading
from collections import Counter
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
from llamatelemetry.inference.speculation_config import SpeculationConfig

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
    """Before and after a soak, how its requests ended, and what befell them: preemptions, blocks
    that came back from the host, drafted and accepted tokens, answers of beams."""

    before: Left
    after: Left
    ends: dict[str, int]
    counts: dict[str, int]


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
    sizes = {"num_blocks": 12, "num_host_blocks": 6, "max_step_tokens": 64, "prefill_chunk": 48}
    drafts = {"speculation": SpeculationConfig(adaptive=False)}
    return ContinuousBatching(8, model, **sizes | drafts | options)


def submit(batcher: ContinuousBatching, rng: random.Random) -> list[RequestHandle]:
    """One request, a group, or the answers of beams, of random shape; every third prompt begins as
    others do."""
    length = rng.choice((1, 3, 10, 40, 100, 150))
    ids = [rng.randrange(VOCAB) for _ in range(length)]
    if rng.random() < 0.3:
        ids = (list(range(64)) + ids)[:150]
    common = {
        "stop_token_ids": range(12) if rng.random() < 0.5 else (),
        "priority": rng.choice((0, 0, 1)),
        "time_limit_s": 1e-4 if rng.random() < 0.02 else None,
    }
    count, length = rng.choice((1, 1, 1, 1, 2, 3)), rng.choice((1, 2, 5, 20, 60))
    if count > 1 and rng.random() < 0.5:
        return batcher.submit_group(ids, [None] * (count - 1), length, num_beams=count, **common)
    params = [
        SamplingParams(temperature=rng.choice((0.0, 1.0)), seed=rng.randrange(99), top_k=20)
        for _ in range(count)
    ]
    logits = None
    if rng.random() < 0.2:
        logits = LogitOptions(presence_penalty=0.5, logprobs=rng.choice((None, 2)))
    speculate = rng.random() < 0.7
    return batcher.submit_group(ids, params, length, logits=logits, speculate=speculate, **common)


def serve(batcher: ContinuousBatching, count: int, seed: int) -> tuple[Counter, Counter]:
    """Serves requests from three threads; returns how they ended, and what befell them."""
    ends: Counter = Counter()
    counts: Counter = Counter()
    lock = threading.Lock()

    def note(handle: RequestHandle) -> None:
        ends[str(handle.request.finish_reason)] += 1
        stats = handle.stats
        counts["preemptions"] += stats.preemptions
        counts["drafted"] += stats.drafted_tokens
        counts["accepted"] += stats.accepted_tokens
        counts["of beams"] += handle.group is not None

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
                    note(handle)
            opened = [one for one in opened if not one.done()]

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends, counts


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


def count_swaps(batcher: ContinuousBatching) -> Counter:
    """A count that grows with the blocks that come back from the host."""
    counts = Counter({"swapped blocks": 0})
    host = batcher._batch.scheduler.host
    swap_in = host.swap_in

    def counted(*args: Any) -> Any:
        cached, pairs = swap_in(*args)
        counts["swapped blocks"] += len(pairs)
        return cached, pairs

    host.swap_in = counted
    return counts


def soak(
    batcher: ContinuousBatching, count: int, warm_up: int = WARM_UP, seconds: float = 0.0
) -> Report:
    """Serves count requests after a warm-up, and as many again until the seconds are over."""
    serve(batcher, warm_up, seed=0)
    before, swapped = left(batcher), count_swaps(batcher)
    over = threading.Timer(seconds, lambda: None)
    over.daemon = True  # an interrupt ends the script at once
    over.start()
    ends, counts = serve(batcher, count, seed=1)
    seed = 2
    while over.is_alive():
        more = serve(batcher, count, seed)
        ends.update(more[0])
        counts.update(more[1])  # + would drop what is 0
        seed += 1
    over.join()
    return Report(before, left(batcher), dict(ends), dict(counts) | dict(swapped))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="of a round")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S")
    args = parser.parse_args()
    found = soak(tiny_batcher(), args.requests, seconds=args.seconds)
    print(json.dumps(asdict(found), indent=2))
