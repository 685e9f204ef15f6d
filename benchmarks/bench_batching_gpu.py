"""Requests at once on a GPU: ContinuousBatching over a random bfloat16 model of Llama-3-8B's shape.

Steps of a batch take turns with and without overlap; "GPU at work" is the time in which any kernel
runs, by torch's profiler, beside that from the first kernel to the last. Whole runs are timed once.
transformers' generate_batch has weights of its own, as random, and the same requests.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
from collections.abc import Callable
from itertools import accumulate
from statistics import mean

import harness
import torch
from batches_gpu import CONTEXT, Rows, arrivals, batcher_of, begun, prompts_of
from bench_decode import PACKED, pack_
from bench_prefill import SHAPE, random_llama
from transformers import GenerationConfig, LlamaForCausalLM

from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.runner import PAGE_SIZE
from llamatelemetry.models.patching import patch

STEPS = 16  # of which a sample is the mean
PREFIX = 2048
# The results of whole loads and of prompts that arrive, beside "batching".
LOAD, ARRIVALS = "batching_load", "batching_arrivals"
RATE = 30.0  # requests a second that arrive at random


def kernels_us(several: Callable[[], None]) -> tuple[float, float]:
    """From the first kernel's start to the last one's end, and the time with any at work."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        several()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    cuda = torch.autograd.DeviceType.CUDA
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == cuda
    )
    busy, end = 0, spans[0][0]
    for begin, stop in spans:
        busy += max(stop - max(begin, end), 0)
        end = max(end, stop)
    return (end - spans[0][0]) / 1e3, busy / 1e3


def steady(
    model: LlamaForCausalLM, batch: int, rounds: int, name: str = "", *, profiles: bool = False
) -> Rows:
    """A token of each request, while nobody comes or goes."""
    more = (2 * (rounds + 1) + 1) * (STEPS + 2) + 8
    batcher = batcher_of(model, batch, CONTEXT + more)
    handles = begun(batcher, prompts_of([CONTEXT] * batch), more)
    running = batcher._batch
    assert running is not None

    def several() -> None:
        for _ in range(STEPS):
            batcher.step()

    def sample(*, overlap: bool) -> float:
        running.overlap = overlap
        batcher.step()  # the first of its kind
        torch.cuda.synchronize()
        return harness.timed_us(lambda: (several(), torch.cuda.synchronize())) / STEPS

    samples = harness.interleave(
        {
            "ours": lambda: sample(overlap=True),
            "without overlap": lambda: sample(overlap=False),
        },
        rounds,
    )
    assert batcher.decode_mode == "graph", batcher.decode_mode
    ours = samples.pop("ours")
    yield harness.Row(f"{name}a token of each of {batch} at {CONTEXT}", ours, samples, tokens=batch)
    if profiles:
        running.overlap = True
        span, busy = kernels_us(several)
        limits = {"kernels": [busy / STEPS]}
        yield harness.Row(f"GPU at work, {batch} at {CONTEXT}", [span / STEPS], {}, limits)
    for handle in handles:
        handle.cancel()


def seed_setting(model: LlamaForCausalLM) -> Rows:
    """Steps one by one: the median is the milliseconds for a token."""
    batcher = batcher_of(model, 2, 512 + 256)
    begun(batcher, prompts_of([512, 512]), 256)
    samples = [harness.timed_us(batcher.step) for _ in range(250)]
    batcher.run()
    yield harness.Row("2 requests, 512 in, 256 out: a step", samples, {}, tokens=2)


def whole(
    model: LlamaForCausalLM,
    name: str,
    lengths: list[tuple[int, int]],
    at_once: int,
    rate: float = float("inf"),
) -> harness.Row:
    """All requests from the first one's submission to the last one's end; they come at once, or at
    random times, so many a second on average."""
    prompts = prompts_of([length for length, _ in lengths])
    batcher = batcher_of(model, at_once, max(map(sum, lengths)))
    rng = random.Random(0)
    waits = [0.0 if rate == float("inf") else rng.expovariate(rate) for _ in lengths]
    handles: list[RequestHandle] = []

    def serve() -> None:
        due, passed = list(accumulate(waits)), 0.0
        while len(handles) < len(prompts) or batcher.active_requests:
            while len(handles) < len(due) and passed >= due[len(handles)]:
                i = len(handles)
                options = {"max_tokens": lengths[i][1], "ignore_eos": True}
                handles.append(batcher.submit(prompts[i], None, **options))
            passed += harness.timed_us(batcher.step) / 1e6
        assert [len(handle.token_ids) for handle in handles] == [count for _, count in lengths]

    return harness.Row(
        name, [harness.timed_us(serve)], {}, tokens=sum(count for _, count in lengths)
    )


def at_random(count: int, most: int, out: int | None = None) -> list[tuple[int, int]]:
    rng = random.Random(count)
    return [(rng.randint(100, most), out or rng.randint(100, most)) for _ in range(count)]


def shared_prefix(model: LlamaForCausalLM, rounds: int) -> Rows:
    """Mean time to the first token of 64 requests, one before them having had their prefix."""
    samples: dict[str, list[float]] = {"ours": [], "no reuse": []}
    batchers = {name: batcher_of(model, 64, PREFIX + 20, shares=name == "ours") for name in samples}
    for turn in range(rounds + 1):
        prefix, *ends = prompts_of([PREFIX + turn, *[16] * 64])
        for name, batcher in batchers.items():
            batcher.submit(prefix, None, 1).result()
            handles = [batcher.submit(prefix[:PREFIX] + end, None, 1) for end in ends]
            batcher.run()
            if turn:  # the first warms up
                samples[name].append(mean(handle.stats.ttft for handle in handles) * 1e6)
    ours = samples.pop("ours")
    yield harness.Row(f"first tokens of 64 requests, {PREFIX} shared", ours, samples)


@torch.inference_mode()
def captures(model: LlamaForCausalLM) -> Rows:
    """Every decode step to 256 rows, run eagerly once and captured."""
    batcher = batcher_of(model, 256, PAGE_SIZE)
    batcher.submit([1], None, 2).result()
    runner = batcher._batch._runner  # type: ignore[union-attr]

    def all_sizes() -> None:
        for rows in runner.buckets[1:]:
            step = runner.runner.decode_step(rows, runner.width)
            step.hold([False] * rows)
            step.run()
        torch.cuda.synchronize()

    name = f"all {len(runner.buckets) - 1} graphs to 256 rows captured"
    yield harness.Row(name, [harness.timed_us(all_sizes)], {})


def beside_transformers(
    model: LlamaForCausalLM, plain: LlamaForCausalLM, count: int, out: int
) -> Rows:
    lengths = at_random(count, 1024, out)
    row = whole(model, f"{count} requests, 100 to 1024 in, {out} out", lengths, count)
    gc.collect()
    torch.cuda.empty_cache()
    inputs = prompts_of([length for length, _ in lengths])

    def theirs(tokens: int) -> None:
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        done = plain.generate_batch(inputs=inputs, generation_config=config)
        assert sum(len(one.generated_tokens) for one in done.values()) == tokens * len(inputs)

    theirs(2)
    row.baselines["generate_batch"] = [harness.timed_us(lambda: theirs(out))]
    yield row


def parts(layers: int, rounds: int) -> dict[str, Callable[[], Rows]]:
    plain = random_llama(layers)
    model = copy.deepcopy(plain)
    gc.collect()
    gc.freeze()  # as serve does: a look for garbage among what was imported takes up to a second

    def packed() -> Rows:
        small = copy.deepcopy(plain)
        pack_(small)
        patch(small)
        yield from steady(small, 1, rounds, f"{PACKED.name}: ")

    def large() -> Rows:
        yield from steady(model, 256, rounds, profiles=True)

    def long() -> Rows:
        yield whole(model, "256 requests, 1000 in, 1000 out", [(1000, 1000)] * 256, 256)

    def many() -> Rows:
        what = "100 to 1024 in and out"
        yield whole(model, f"512 requests, {what}", at_random(512, 1024), 256)
        name = f"256 requests, {what}, {RATE:g} arrive a second"
        yield whole(model, name, at_random(256, 1024), 256, RATE)

    def small_batches() -> Rows:
        for batch in (1, 8, 32, 64):
            yield from steady(model, batch, rounds, profiles=batch in (1, 64))

    return {
        "seed": lambda: seed_setting(model),
        "steady": small_batches,
        "packed": packed,
        "arrivals": lambda: arrivals(model, 1),
        "prefix": lambda: shared_prefix(model, rounds),
        "captures": lambda: captures(model),
        "transformers": lambda: beside_transformers(model, plain, 48, 128),
        "long": long,
        "large": large,
        "many": many,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers, one round, no JSON")
    parser.add_argument("parts", nargs="*", help="of the benchmark; default: all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("batching: needs a GPU, measured nothing")
        return
    quick, rows = arguments.quick, {"batching": [], LOAD: [], ARRIVALS: []}
    tables = {"arrivals": ARRIVALS, "large": LOAD, "many": LOAD}
    made = parts(2 if quick else SHAPE["num_hidden_layers"], 1 if quick else 3)
    for name in arguments.parts or made:
        table = tables.get(name, "batching")
        for row in made[name]():
            rows[table].append(row)
            harness.print_rows([row])
            if not quick:  # after each, so that what was measured stays
                harness.save(table, torch.device("cuda"), rows[table])


if __name__ == "__main__":
    main()
