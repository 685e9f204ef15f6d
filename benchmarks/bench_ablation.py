"""What each part of the package gives, one after another, to a model that people bring.

Every row adds one public call to those above it: transformers' eager attention and forward first.
optimize_kv_cache keeps keys and values in pages and replays a token's step, as a CUDA graph or on
the CPU as a recording; all of these run transformers' own generate. The last is the engine, which
draws the token inside the step.

On a GPU random models of the shapes of Llama-3.2-1B and Llama-3-8B in bfloat16, on the CPU SmolLM2
in float32, where packed weights are a row more.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import harness
import torch
from bench_prefill import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.cuda import optimize_for_tensor_cores
from llamatelemetry.inference import enable_flash_attention, optimize_kv_cache
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.dense import load_dense
from llamatelemetry.loading.find import find_model, load_model
from llamatelemetry.models.patching import patch

SHAPES = {
    "Llama-3.2-1B": SHAPE
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Llama-3-8B": SHAPE,
}
BATCHES = (1, 2, 8)
BASE = "transformers eager"
FIRST = "first token"

# Greedy, so many tokens for each prompt: microseconds to the first, and for each of the others.
Contestant = Callable[[list[list[int]], int], tuple[float, float]]


def synchronized_us(function: Callable[[], object]) -> float:
    """Of a function and of all that it has left to the GPU."""

    def run() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return harness.timed_us(run)


def by_generate(model: Any) -> Contestant:
    """transformers' own generate, which cannot be stepped: its steps are what a long call takes
    longer than one of a single token."""

    def us(prompts: list[list[int]], steps: int) -> tuple[float, float]:
        ids = torch.tensor(prompts, device=model.device)
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False}

        @torch.inference_mode()
        def run(tokens: int) -> None:
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **settings)

        first = synchronized_us(lambda: run(1))
        return first, (synchronized_us(lambda: run(steps)) - first) / (steps - 1)

    return us


def by_engine(model: Any) -> Contestant:
    generator = TokenGenerator(model)

    def us(prompts: list[list[int]], steps: int) -> tuple[float, float]:
        tokens = generator.generate(prompts, [GREEDY] * len(prompts), steps)
        first = harness.timed_us(lambda: next(tokens))  # the second may have been launched by now
        return first, synchronized_us(lambda: list(tokens)) / (steps - 1)

    return us


def on_gpu(shape: dict[str, Any]) -> dict[str, Contestant]:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        config = LlamaConfig(**shape, attn_implementation="eager")
        plain = LlamaForCausalLM(config).eval().requires_grad_(False)
    plain.generation_config.eos_token_id = None
    flash, fused, cached = (copy.deepcopy(plain) for _ in range(3))
    for model in (flash, fused, cached):
        enable_flash_attention(model)
    for model in (fused, cached):
        optimize_for_tensor_cores(model, torch.bfloat16)
    optimize_kv_cache(cached)
    return {
        BASE: by_generate(plain),
        "+ flash attention": by_generate(flash),
        "+ tensor cores, fused ops": by_generate(fused),
        "+ KV cache, CUDA graphs": by_generate(cached),
        "all in the engine": by_engine(fused),
    }


def on_cpu(path: str) -> dict[str, Contestant]:
    def dense() -> Any:
        model = load_dense(path, device="cpu", dtype=torch.float32)
        model.set_attn_implementation("eager")
        model.generation_config.eos_token_id = None
        return model

    plain, flash, fused, cached = (dense() for _ in range(4))
    for model in (flash, fused, cached):
        enable_flash_attention(model)
    for model in (fused, cached):
        patch(model)
    optimize_kv_cache(cached)
    packed = load_model(path, device="cpu").model
    patch(packed)
    return {
        BASE: by_generate(plain),
        "+ flash attention": by_generate(flash),
        "+ fused ops": by_generate(fused),
        "+ KV cache, recorded steps": by_generate(cached),
        "all in the engine": by_engine(fused),
        "the engine, packed weights": by_engine(packed),
    }


def measure(
    model: str,
    contestants: dict[str, Contestant],
    vocab_size: int,
    cases: list[tuple[int, int]],
    rounds: int,
    steps: int,
) -> Iterator[harness.Row]:
    """Rows of one model: for (batch, prompt), a step of all in turns, and the first token."""
    for batch, length in cases:
        prompts = torch.randint(0, vocab_size, (batch, length)).tolist()
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name, contestant in contestants.items():
                us = contestant(prompts, steps)
                if number:  # the first round warms up
                    samples[name].append(us)
        for column, what in enumerate([FIRST, "one more token"]):
            if (what == FIRST) != (length >= 2048):
                continue  # a long prompt is measured for its first token, a short one for the rest
            theirs = [pair[column] for pair in samples[BASE]]
            for name, pairs in samples.items():
                label = f"{model}, {what}, batch {batch} after {length}: {name}"
                yield harness.Row(label, [pair[column] for pair in pairs], {BASE: theirs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: all present")
    parser.add_argument("--quick", action="store_true", help="one round, two layers, no JSON")
    quick = (arguments := parser.parse_args()).quick
    warnings.simplefilter("ignore")
    rounds, steps = (1, 5) if quick else (3, 17)
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in [arguments.device] if arguments.device else present:
        rows: list[harness.Row] = []
        if device == "cpu":
            path = str(find_model("smollm2"))
            cases = [(1, 128)] if quick else [*((batch, 128) for batch in BATCHES), (1, 2048)]
            rows += measure("SmolLM2-135M", on_cpu(path), 49152, cases, rounds, steps)
        else:
            for name, shape in SHAPES.items():
                layers = {"num_hidden_layers": 2} if quick else {}
                contestants = on_gpu(shape | layers)
                cases = [*((batch, 512) for batch in BATCHES), (1, 2048)]
                rows += measure(name, contestants, SHAPE["vocab_size"], cases, rounds, steps)
                del contestants
                torch.cuda.empty_cache()
        harness.print_rows(rows)
        if not quick:
            print(f"wrote {harness.save('ablation', torch.device(device), rows)}")
        last = [row for row in rows if "engine" in row.name and "batch 1 after 512" in row.name]
        for row in last:
            print(f"{row.name}: {row.speedup(BASE):.2f} times, {median(row.ours) / 1e3:.2f} ms")


if __name__ == "__main__":
    main()
