"""Eight requests at once beside one after the other: SmolLM2 Q4_1 on the CPU, continuous batching.

All contestants draw the same number of greedy tokens for the same eight prompts, in one process and
in turns; prefixes are not shared, so that every prompt is computed by each of them. The row of a
token of each takes turns step by step, and has no prompts in it.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
from bench_generate import TEXT, run_on_cpu

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.find import load_model

REQUESTS = 8
PROMPT_TOKENS, NEW_TOKENS = 16, 24

Contestant = Callable[[], "list[list[int]]"]  # tokens of each request


def together(batcher: ContinuousBatching, prompts: list[list[int]]) -> Contestant:
    def serve() -> list[list[int]]:
        handles = [batcher.submit(ids, None, NEW_TOKENS, ignore_eos=True) for ids in prompts]
        batcher.run()
        return [handle.result().token_ids for handle in handles]

    return serve


def one_after_the_other(batcher: ContinuousBatching, prompts: list[list[int]]) -> Contestant:
    return lambda: [together(batcher, [ids])()[0] for ids in prompts]


def generate(engine: InferenceEngine, prompts: list[list[int]]) -> Contestant:
    def serve() -> list[list[int]]:
        return [
            [token for (token,) in engine.generator.generate([ids], [GREEDY], NEW_TOKENS)]
            for ids in prompts
        ]

    return serve


def compare(name: str, ours: Contestant, others: dict[str, Contestant], rounds: int) -> harness.Row:
    contestants = {"ours": ours, **others}
    counts = {peer: [len(row) for row in serve()] for peer, serve in contestants.items()}
    assert len({tuple(count) for count in counts.values()}) == 1, counts
    samples = harness.interleave(
        {peer: lambda serve=serve: harness.timed_us(serve) for peer, serve in contestants.items()},
        rounds,
    )
    return harness.Row(name, samples["ours"], {peer: samples[peer] for peer in others})


def token_of_each(engine: InferenceEngine, prompts: list[list[int]], rounds: int) -> harness.Row:
    """One step of all requests, and as many steps of one alone."""
    sizes = {"ours": len(prompts), "one at a time": 1}
    samplers = {}
    for name, size in sizes.items():
        batcher = ContinuousBatching(size, engine, share_prefixes=False)
        for ids in prompts[:size]:
            batcher.submit(ids, None, (rounds + 4) * len(prompts) // size, ignore_eos=True)
        batcher.step()  # the prompts
        batcher.step()  # the step that is recorded

        def several(
            batcher: ContinuousBatching = batcher, count: int = len(prompts) // size
        ) -> None:
            for _ in range(count):
                batcher.step()

        samplers[name] = lambda several=several: harness.timed_us(several)
    samples = harness.interleave(samplers, rounds)
    ours = samples.pop("ours")
    return harness.Row(f"a token of each of {len(prompts)} requests", ours, samples)


def measure(path: str, quick: bool) -> list[harness.Row]:
    rounds = 1 if quick else 3
    engine = InferenceEngine(load_model(path, device="cpu"))
    ids = engine.tokenizer.encode(TEXT, add_special_tokens=False)
    prompts = [ids[i : i + PROMPT_TOKENS] for i in range(REQUESTS)]
    batcher = ContinuousBatching(REQUESTS, engine, share_prefixes=False)
    label = f"{PROMPT_TOKENS} tokens in, {NEW_TOKENS} out"
    rows = [
        compare(
            f"{REQUESTS} requests, {label}",
            together(batcher, prompts),
            {"one at a time": one_after_the_other(batcher, prompts)},
            rounds,
        ),
        compare(
            f"1 request, {label}",
            together(batcher, prompts[:1]),
            {"generate": generate(engine, prompts[:1])},
            4 * rounds,
        ),
        token_of_each(engine, prompts, 12 * rounds),
    ]
    assert batcher.decode_mode == "recorded", batcher.decode_mode
    return rows


if __name__ == "__main__":
    run_on_cpu("batching", __doc__, measure)
