"""Whole float32 models on the CPU with keys and values in 16 bits, beside the same in float32.

    python benchmarks/bench_cache_dtype.py model-Q4_0.gguf --levels avx2 avx512bf16

A process a CPU level. In it all cache dtypes share the weights, and take turns over the same ids,
greedily: the first token, and each further one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import harness
import torch

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.find import find_model, load_model
from llamatelemetry.models.patching import patch

PROMPTS = {128: 32, 1500: 32}  # tokens of the prompt: new tokens
WIDE = "float32 cache"
DTYPES = {WIDE: None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def ids_of(count: int) -> list[int]:
    return [(1000 + 37 * i) % 30000 for i in range(count)]


def rows_of(path: str, level: str, rounds: int) -> list[harness.Row]:
    """The rows of this process's CPU level."""
    model = load_model(path, device="cpu").model
    patch(model)
    generators = {name: TokenGenerator(model, None, dtype) for name, dtype in DTYPES.items()}

    def run(name: str, prompt: int, new: int) -> tuple[float, float]:
        tokens = generators[name].generate([ids_of(prompt)], [GREEDY], new)
        first = harness.timed_us(lambda: next(tokens))
        return first, harness.timed_us(lambda: [next(tokens) for _ in range(new - 1)]) / (new - 1)

    rows, names = [], list(DTYPES)
    for prompt, new in PROMPTS.items():
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                sample = run(name, prompt, new)
                if number:  # the first round warms up
                    samples[name].append(sample)
        for name in names[1:]:
            for column, what in enumerate(["first token", "one more token"]):
                rows.append(
                    harness.Row(
                        name=f"{Path(path).stem}, {level}, {name}, {what} after {prompt}",
                        ours=[sample[column] for sample in samples[name]],
                        baselines={WIDE: [sample[column] for sample in samples[WIDE]]},
                    )
                )
    return rows


def rows_of_level(path: str, level: str, rounds: int) -> list[harness.Row]:
    command = [sys.executable, __file__, path, "--work", level, "--rounds", str(rounds)]
    done = subprocess.run(
        command,
        env=os.environ | {"LLAMATELEMETRY_CPU_ISA": level},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [harness.Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="smollm2 or a GGUF file")
    parser.add_argument("--levels", nargs="+", default=["avx2"], help="CPU levels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round, no JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = str(find_model(arguments.model))
    if arguments.work:
        rows = rows_of(path, arguments.work, arguments.rounds)
        print(json.dumps([asdict(row) for row in rows]))
        return
    rounds = 1 if arguments.quick else arguments.rounds
    rows = [row for level in arguments.levels for row in rows_of_level(path, level, rounds)]
    harness.print_rows(rows)
    if not arguments.quick:
        print(f"wrote {harness.save('cache_dtype', torch.device('cpu'), rows)}")


if __name__ == "__main__":
    main()
