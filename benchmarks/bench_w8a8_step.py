"""A decode step of the engine over a model of W8A8 linears, and over the same in bfloat16.

A random model of Llama-3-8B's shape on a GPU; its head stays in bfloat16. The limit is a read of
the weights that a step of W8A8 needs.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import harness
import torch
from bench_prefill import SHAPE, random_llama
from bench_step import CONTEXT, step_us

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.models.patching import patch
from llamatelemetry.quantization.w8a8 import quantize_w8a8

BATCHES = (1, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers, one round, no JSON")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print("w8a8_step: needs a GPU, measured nothing")
        return
    device = torch.device("cuda")
    dense: Any = random_llama(2 if quick else SHAPE["num_hidden_layers"])
    dense.generation_config.eos_token_id = None
    models = {"bfloat16": dense}
    for kind in ("int8", "fp8"):
        models[kind] = quantize_w8a8(copy.deepcopy(dense), kind)
    for model in models.values():
        report = patch(model)
        assert not report.refused, report.refused
    generators = {name: TokenGenerator(model) for name, model in models.items()}
    tensors = [*models["int8"].model.layers.buffers(), dense.lm_head.weight]
    num_bytes = sum(x.nbytes for x in tensors)
    limit_name, limit = harness.bandwidth_limit(num_bytes, device)
    rows = []
    for batch in BATCHES:
        prompts = torch.randint(0, SHAPE["vocab_size"], (batch, CONTEXT), device="cpu").tolist()
        samplers = {name: step_us(one, prompts) for name, one in generators.items()}
        samplers[limit_name] = limit
        for sampler in samplers.values():
            sampler()
        samples = harness.interleave(samplers, 1 if quick else 6)
        rows += [
            harness.Row(
                f"{kind}, batch {batch} after {CONTEXT}",
                samples[kind],
                {"bfloat16": samples["bfloat16"]},
                {limit_name: samples[limit_name]},
                bytes_moved=num_bytes,
            )
            for kind in ("int8", "fp8")
        ]
    harness.print_rows(rows)
    if not quick:
        print(f"wrote {harness.save('w8a8_step', device, rows)}")


if __name__ == "__main__":
    main()
