"""Batches of a GPU's benchmark: requests that decode, and long prompts that arrive beside them.

Gaps are the times of steps, each of which gives a token to each request that decodes; the row has
their 99th percentile in each round, while a prompt arrives every quarter of a second.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from statistics import mean

import harness
import torch
from bench_prefill import SHAPE
from transformers import LlamaForCausalLM

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.runner import PAGE_SIZE

CONTEXT = 1024  # tokens of a prompt
LONG = 4096  # tokens of one that arrives while others decode
ARRIVALS, EVERY_S = 8, 0.25
Rows = Iterator[harness.Row]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(sum(lengths))
    return [[rng.randrange(SHAPE["vocab_size"]) for _ in range(length)] for length in lengths]


def batcher_of(
    model: LlamaForCausalLM, batch: int, tokens: int, *, shares: bool = False
) -> ContinuousBatching:
    """One whose cache holds so many tokens of each request, in memory that others have left."""
    gc.collect()
    torch.cuda.empty_cache()
    blocks = batch * (-(-tokens // PAGE_SIZE) + 1)
    return ContinuousBatching(
        batch, model, num_blocks=blocks, share_prefixes=shares, max_step_tokens=8192
    )


def begun(batcher: ContinuousBatching, prompts: list[list[int]], more: int) -> list[RequestHandle]:
    """Requests that decode, each for so many tokens more: their prompts are computed in as few
    steps as they can, so that no one is far ahead of the others."""
    running = batcher._batch
    assert running is not None
    chunk, running.scheduler.prefill_chunk = running.scheduler.prefill_chunk, 8192
    handles = [batcher.submit(ids, None, more, ignore_eos=True) for ids in prompts]
    while any(len(handle.token_ids) < 3 for handle in handles):
        batcher.step()
    running.scheduler.prefill_chunk = chunk
    return handles


def arrivals(model: LlamaForCausalLM, rounds: int, batch: int = 64) -> Rows:
    """The gaps of requests that decode while long prompts arrive, and until these have a token."""
    samples: dict[str, list[float]] = {}
    first: dict[str, list[float]] = {}
    # Tokens of prompts in a step, whether in one forward with the rows, whether that is captured.
    ways = {"ours": (512, True, True), "eager": (512, True, False), "apart": (8192, False, False)}
    batcher = batcher_of(model, batch + ARRIVALS, CONTEXT + LONG)
    running = batcher._batch
    assert running is not None
    handles = begun(batcher, prompts_of([CONTEXT] * batch), LONG)
    for turn in range(rounds + 1):
        for name, (chunk, packs, is_on) in ways.items():
            runner = running._runner
            running.scheduler.prefill_chunk, runner.packs = chunk, packs
            runner.chunk_steps.is_on = is_on
            gaps: list[float] = []
            late: list[RequestHandle] = []
            while len(late) < ARRIVALS or not all(handle.done() for handle in late):
                if len(late) < ARRIVALS and sum(gaps) >= len(late) * EVERY_S * 1e6:
                    late.append(batcher.submit(*prompts_of([LONG]), None, 1))
                gaps.append(harness.timed_us(batcher.step))
            if turn:  # the first warms up, and captures
                samples.setdefault(name, []).append(sorted(gaps)[len(gaps) * 99 // 100])
                first.setdefault(name, []).append(mean(one.stats.ttft for one in late) * 1e6)
    for handle in handles:
        handle.cancel()
    row = f"{batch} decode, prompts of {LONG} arrive"
    for name, found in (("p99 of the gaps", samples), ("their first tokens", first)):
        ours = found.pop("ours")
        yield harness.Row(f"{row}: {name}", ours, found)
