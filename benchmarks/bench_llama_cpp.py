"""Whole models beside llama.cpp on the CPU: first token and each further one, per CPU level.

    python benchmarks/bench_llama_cpp.py model-Q4_0.gguf --levels avx2 avx512 --prompts 128

llama.cpp is the wheel xllamacpp (pip install xllamacpp), which is built for AVX2. Each contestant
is a process of its own that keeps its model, for a CPU level and spinning threads are a process's;
they take turns and run the same ids, greedily, on as many threads. Rows of other files that were
measured at the same commit stay in results/llama_cpp-cpu.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch

PROMPTS = {128: 48, 1500: 32}  # tokens of the prompt: new tokens
PEER = "llama.cpp"

Run = Callable[[int, int], tuple[float, float]]  # (prompt, new tokens) -> us to first, us of others


def ids_of(count: int) -> list[int]:
    return [(1000 + 37 * i) % 30000 for i in range(count)]


def llama_cpp(path: str, threads: int) -> Run:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx, params.n_parallel = 2 * max(PROMPTS), 1
    server = xllamacpp.Server(params)

    def run(prompt: int, new: int) -> tuple[float, float]:
        request = {"prompt": ids_of(prompt), "max_tokens": new, "temperature": 0.0}
        answer = server.handle_completions(request | {"cache_prompt": False, "ignore_eos": True})
        timings = (json.loads(answer) if isinstance(answer, str | bytes) else answer)["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (prompt, new), timings
        # Its prompt time ends with the first token.
        return timings["prompt_ms"] * 1e3, timings["predicted_ms"] * 1e3 / (new - 1)

    return run


def ours(path: str, threads: int) -> Run:
    from llamatelemetry.inference.engine import InferenceEngine
    from llamatelemetry.inference.sampling import GREEDY
    from llamatelemetry.loading.find import load_model

    torch.set_num_threads(threads)
    generator = InferenceEngine(load_model(path, device="cpu")).generator

    def run(prompt: int, new: int) -> tuple[float, float]:
        tokens = generator.generate([ids_of(prompt)], [GREEDY], new)
        first = harness.timed_us(lambda: next(tokens))
        rest = harness.timed_us(lambda: [next(tokens) for _ in range(new - 1)])
        return first, rest / (new - 1)

    return run


def work(contestant: str, path: str, threads: int) -> None:
    """A contestant's process: answers each line "prompt new" with its two times."""
    run = (llama_cpp if contestant == PEER else ours)(path, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        print("times", *run(*map(int, line.split())), flush=True)


class Contestant:
    """A process of work(), in which the CPU level of ours is the contestant's name."""

    def __init__(self, name: str, path: str, threads: int) -> None:
        level = {} if name == PEER else {"LLAMATELEMETRY_CPU_ISA": name}
        self.process = subprocess.Popen(
            [sys.executable, __file__, path, "--work", name, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | level | {"OMP_NUM_THREADS": str(threads)},
        )
        self._line("ready")

    def _line(self, begin: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # the wheel logs there too
            if line.startswith(begin):
                return line.split()[1:]
        raise SystemExit(f"{' '.join(map(str, self.process.args))} ended early")

    def run(self, prompt: int, new: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        print(prompt, new, file=self.process.stdin, flush=True)
        first, other = map(float, self._line("times"))
        time.sleep(0.05)  # lets its threads fall asleep
        return first, other


def measure(
    path: str, levels: list[str], prompts: list[int], threads: int, rounds: int
) -> list[harness.Row]:
    names = [*levels, PEER]
    contestants = {name: Contestant(name, path, threads) for name in names}
    rows = []
    for prompt in prompts:
        new = PROMPTS[prompt]
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                sample = contestants[name].run(prompt, new)
                if number:  # the first round warms up
                    samples[name].append(sample)
        for level in levels:
            for column, what in enumerate(["first token", "one more token"]):
                rows.append(
                    harness.Row(
                        name=f"{Path(path).stem}, {level}, {what} after {prompt}",
                        ours=[sample[column] for sample in samples[level]],
                        baselines={PEER: [sample[column] for sample in samples[PEER]]},
                    )
                )
    for contestant in contestants.values():
        contestant.process.communicate()  # closes its input, which ends it
    return rows


def kept_rows(rows: list[harness.Row]) -> list[harness.Row]:
    """Rows of other names that this commit has measured already."""
    path = harness.RESULTS / "llama_cpp-cpu.json"
    if not path.exists():
        return []
    environment, before = harness.load(path)
    names = {row.name for row in rows}
    if environment["commit"] != harness.environment()["commit"]:
        return []
    return [row for row in before if row.name not in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="a GGUF file")
    parser.add_argument("--levels", nargs="+", default=["avx2"], help="CPU levels of ours")
    parser.add_argument(
        "--prompts", nargs="+", type=int, choices=PROMPTS, default=[*PROMPTS], help="tokens"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, no JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.file, arguments.threads)
        return
    if importlib.util.find_spec("xllamacpp") is None:
        raise SystemExit("llama.cpp is absent: pip install xllamacpp")
    rounds = 1 if arguments.quick else arguments.rounds
    rows = measure(arguments.file, arguments.levels, arguments.prompts, arguments.threads, rounds)
    harness.print_rows(rows)
    if not arguments.quick:
        all_rows = sorted([*kept_rows(rows), *rows], key=lambda row: row.name)
        print(f"wrote {harness.save('llama_cpp', torch.device('cpu'), all_rows)}")


if __name__ == "__main__":
    main()
