"""A decode step of the engine over a dense model: its linears by our op, and by torch's.

On a GPU a random model of Llama-3-8B's shape in bfloat16, on the CPU SmolLM2 in float32. The limit
is a read of the weights that a step needs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import harness
import torch
from bench_prefill import SHAPE, random_llama

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.dense import load_dense
from llamatelemetry.loading.find import find_model
from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.patching import patch

CONTEXT, FIRST, STEPS = 128, 4, 24
BATCHES = (1, 4, 8, 16)


def step_us(generator: TokenGenerator, prompts: list[list[int]]) -> Callable[[], float]:
    """Microseconds of a step, the first ones left out, which record or capture: from token to
    token, for on a GPU the first of those timed may have been launched before."""

    def us() -> float:
        tokens = generator.generate(prompts, [GREEDY] * len(prompts), FIRST + STEPS)
        for _ in range(FIRST):
            next(tokens)
        return harness.timed_us(lambda: list(tokens)) / STEPS

    return us


def contestant(model: Any, ops: OpSet, prompts: list[list[int]]) -> Callable[[], float]:
    """A step of the model with these ops."""
    patch(model, ops=ops)
    return step_us(TokenGenerator(model), prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="one batch, one round, no JSON")
    arguments = parser.parse_args()
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(arguments.device or default)
    if device.type == "cuda":
        model: Any = random_llama(2 if arguments.quick else SHAPE["num_hidden_layers"])
        model.generation_config.eos_token_id = None
    else:
        path = str(find_model("smollm2"))
        model = load_dense(path, device="cpu", dtype=torch.float32)
    vocab_size, head = model.config.vocab_size, model.get_output_embeddings().weight
    weights = [*(p for p in model.model.layers.parameters()), head]
    num_bytes = sum(p.nbytes for p in weights)
    with_torch, rows = copy.deepcopy(model), []
    name, limit = harness.bandwidth_limit(num_bytes, device)
    for batch in BATCHES[: 1 if arguments.quick else None]:
        prompts = torch.randint(0, vocab_size, (batch, CONTEXT), device="cpu").tolist()
        samplers = {
            "ours": contestant(model, NATIVE, prompts),
            "torch's linears": contestant(with_torch, replace(NATIVE, linear=None), prompts),
            name: limit,
        }
        for sampler in samplers.values():
            sampler()
        samples = harness.interleave(samplers, 1 if arguments.quick else 8)
        rows.append(
            harness.Row(
                f"batch {batch} after {CONTEXT}",
                samples["ours"],
                {"torch's linears": samples["torch's linears"]},
                {name: samples[name]},
                bytes_moved=num_bytes,
            )
        )
    harness.print_rows(rows)
    if not arguments.quick:
        print(f"wrote {harness.save('step', device, rows)}")


if __name__ == "__main__":
    main()
