"""A decode step of a random model of Llama-3-8B's shape: the engine in bfloat16 and with packed
4-bit weights, beside transformers' own forward in bfloat16 with a dynamic cache."""

from __future__ import annotations

import copy

import harness
import torch
from bench_prefill import SHAPE, random_llama, run_on_gpu
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from llamatelemetry._native.facts import FORMATS
from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.patching import patch
from llamatelemetry.ops import QuantFormat, repack
from llamatelemetry.quantization.modules import QuantLinear

STEPS = 16  # that one sample is the mean of
PACKED = QuantFormat.Q4_K
CASES = [(1, 128), (1, 1024), (1, 8192), (16, 1024), (64, 1024)]  # batch, context


def random_packed(n: int, k: int, format: QuantFormat) -> torch.Tensor:
    """Random codes under scales of about 2^-11, so that activations stay in range."""
    facts = FORMATS[format.name]
    shape = (n, k // facts.block_size, facts.block_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    for name in ("scale", "min"):
        if name in facts.fields:
            blocks[..., facts.fields[name][0] + 1] = 0x10
    return repack(blocks.view(n, -1), format)


def pack_(model: LlamaForCausalLM) -> None:
    """Packed weights in the place of the linears', random as they were."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            n, k = module.weight.shape
            packed = random_packed(n, k, PACKED)
            model.set_submodule(name, QuantLinear(packed, PACKED, n))


def engine_us(generator: TokenGenerator, prompts: list[list[int]], rounds: int) -> list[float]:
    """Microseconds a step, of STEPS steps each time: from token to token, for the first of those
    timed has been launched before its turn."""
    steps = generator.generate(prompts, [GREEDY] * len(prompts), (rounds + 2) * STEPS + 1)
    samples = []

    def several() -> None:
        for _ in range(STEPS):
            next(steps)

    several()  # the prefill, and the first step that captures
    for _ in range(rounds):
        samples.append(harness.timed_us(several) / STEPS)
    steps.close()
    return samples


@torch.inference_mode()
def transformers_us(model: LlamaForCausalLM, prompts: list[list[int]], rounds: int) -> list[float]:
    cache = DynamicCache()
    ids = torch.tensor(prompts, device="cuda")
    state = {"ids": model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)}

    def several() -> None:
        for _ in range(STEPS):
            logits = model(input_ids=state["ids"], past_key_values=cache).logits
            state["ids"] = logits.argmax(-1)
            state["ids"].tolist()  # as a generation looks at each token

    several()
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        samples.append(harness.timed_us(several) / STEPS)
    return samples


def measure(layers: int, quick: bool) -> list[harness.Row]:
    rounds = 2 if quick else 5
    plain = random_llama(layers)
    patched, packed = copy.deepcopy(plain), copy.deepcopy(plain)
    pack_(packed)
    models = {"bfloat16": patched, PACKED.name: packed}
    for model in models.values():
        report = patch(model)
        assert not report.refused, report.refused
    rows = []
    for batch, context in CASES[:2] if quick else CASES:
        prompts = torch.randint(0, SHAPE["vocab_size"], (batch, context)).tolist()
        theirs = transformers_us(plain, prompts, rounds)
        for name, model in models.items():
            ours = engine_us(TokenGenerator(model), prompts, rounds)
            label = f"{name} batch {batch} at {context}"
            rows.append(harness.Row(label, ours, {"transformers bf16": theirs}))
    return rows


if __name__ == "__main__":
    run_on_gpu("decode", __doc__, measure)
