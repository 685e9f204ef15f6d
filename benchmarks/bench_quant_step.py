"""A decode step of the engine over 4-bit linears, and over the same model in bfloat16.

A random model of Llama-3-8B's shape on a GPU: all linears and the head in int4 with groups of 128,
and in the formats that llama.cpp's Q4_K_M has (Q6_K in the head and half of the layers' v and down,
Q4_K elsewhere). The limit is a read of the quantised weights. --profile prints where a step goes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import harness
import torch
from bench_prefill import SHAPE, random_llama
from bench_step import CONTEXT, step_us
from torch import nn
from torch.profiler import ProfilerActivity, profile

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.patching import patch
from llamatelemetry.ops import QuantFormat, repack
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.groups import pack_groups
from llamatelemetry.quantization.modules import QuantLinear

BATCHES = (1, 16)
GROUP, PROFILED_STEPS = 128, 8


def int4_linear(name: str, n: int, k: int, layers: int) -> nn.Module:
    codes = torch.randint(-8, 8, (n, k), device="cuda", dtype=torch.int8)
    scales = 0.01 * torch.rand(n, k // GROUP, device="cuda")
    return GroupLinear(pack_groups(codes, "S4", scales), k, n)


def q4_k_m_linear(name: str, n: int, k: int, layers: int) -> nn.Module:
    format = QuantFormat.Q6_K if has_six_bits(name, layers) else QuantFormat.Q4_K
    rows = torch.randint(0, 256, (n, format.row_bytes(k)), dtype=torch.uint8, device="cuda")
    blocks = rows.view(n, -1, format.block_bytes)
    for field in ("scale", "min"):
        if field in format.facts.fields:
            offset, num_bytes = format.facts.fields[field]
            small = torch.tensor([1e-4], dtype=torch.float16, device="cuda")
            blocks[..., offset : offset + num_bytes] = small.view(torch.uint8)
    return QuantLinear(repack(rows, format), format, n)


def has_six_bits(name: str, layers: int) -> bool:
    """llama.cpp's choice: more bits where errors cost most."""
    if name == "lm_head":
        return True
    layer, part = int(name.split(".")[2]), name.rpartition(".")[2]
    outer = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    return part in ("v_proj", "down_proj") and outer


MODELS = {"int4, groups of 128": int4_linear, "Q4_K_M": q4_k_m_linear}


def quantised_llama(kind: str, layers: int) -> Any:
    model: Any = random_llama(layers)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, part = name.rpartition(".")
            n, k = linear.weight.shape
            setattr(model.get_submodule(parent), part, MODELS[kind](name, n, k, layers))
    return model


def weight_bytes(model: Any) -> int:
    """What a step reads, but for its row of the embedding and the norms."""
    kinds = (GroupLinear, QuantLinear)
    linears = [one for one in model.modules() if isinstance(one, kinds)]
    return sum(x.nbytes for one in linears for x in one.buffers(recurse=False))


def kernel_us(generator: TokenGenerator, prompts: list[list[int]]) -> dict[str, tuple[int, float]]:
    """Of each kernel of a step how often it runs and what it adds to the end of those before."""
    tokens = generator.generate(prompts, [GREEDY] * len(prompts), PROFILED_STEPS + 8)
    for _ in range(4):
        next(tokens)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(PROFILED_STEPS):
            next(tokens)
        torch.cuda.synchronize()
    tokens.close()
    found: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    end = None
    for start, stop, name in sorted(_spans(run)):
        if end is not None:
            count, us = found[name]
            found[name] = count + 1, us + max(stop - max(start, end), 0.0)
            count, us = found["nothing runs"]
            found["nothing runs"] = count + 1, us + max(start - end, 0.0)
        end = stop if end is None else max(end, stop)
    return {
        name: (round(count / PROFILED_STEPS), us / PROFILED_STEPS)
        for name, (count, us) in found.items()
    }


def _spans(run: Any) -> Iterator[tuple[float, float, str]]:
    for event in run.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            yield event.time_range.start, event.time_range.end, event.name[:110]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers, one round, no JSON")
    parser.add_argument("--profile", action="store_true", help="prints kernels too")
    arguments = parser.parse_args()
    quick = arguments.quick
    if not torch.cuda.is_available():
        print("quant_step: needs a GPU, measured nothing")
        return
    device, layers = torch.device("cuda"), 2 if quick else SHAPE["num_hidden_layers"]
    models = {kind: quantised_llama(kind, layers) for kind in MODELS}
    models["bfloat16"] = random_llama(layers)
    for model in models.values():
        model.generation_config.eos_token_id = None
        report = patch(model)
        assert not report.refused, report.refused
    generators = {name: TokenGenerator(model) for name, model in models.items()}
    rows = []
    for batch in BATCHES:
        prompts = torch.randint(0, SHAPE["vocab_size"], (batch, CONTEXT), device="cpu").tolist()
        samplers = {name: step_us(one, prompts) for name, one in generators.items()}
        limits = {k: harness.bandwidth_limit(weight_bytes(models[k]), device) for k in MODELS}
        samplers |= {f"limit of {kind}": limit for kind, (_, limit) in limits.items()}
        for sampler in samplers.values():
            sampler()
        samples = harness.interleave(samplers, 1 if quick else 6)
        rows += [
            harness.Row(
                f"{kind}, batch {batch} after {CONTEXT}",
                samples[kind],
                {"bfloat16": samples["bfloat16"]},
                {limits[kind][0]: samples[f"limit of {kind}"]},
                bytes_moved=weight_bytes(models[kind]),
            )
            for kind in MODELS
        ]
        for kind in MODELS if arguments.profile else ():
            found = kernel_us(generators[kind], prompts)
            print(f"{kind}, batch {batch}: us of a step")
            for name, (count, us) in sorted(found.items(), key=lambda item: -item[1][1])[:24]:
                print(f"{us:8.1f} {count:4} {name}")
    harness.print_rows(rows)
    if not quick:
        print(f"wrote {harness.save('quant_step', device, rows)}")


if __name__ == "__main__":
    main()
