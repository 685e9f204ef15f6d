"""A token of the engine over Triton's kernels and over ours in CUDA: random models of the shapes of
Llama-3-8B and Granite-8B-Code in bfloat16, two prompts of 512 tokens, 256 new ones of each.

As one graph, beside it of launches that nobody measured, and eagerly. Logits of 4 such layers are
compared first.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import harness
import torch
from bench_prefill import SHAPE, run_on_gpu
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.runner import PAGE_SIZE
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.inference.step import Chunk
from llamatelemetry.models.patching import patch, unpatch
from llamatelemetry.triton_ops import tuning

BATCH, PROMPT, NEW, SAMPLES, EAGER = 2, 512, 256, 4, 8
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {},
    "Granite-8B-Code": {
        "num_hidden_layers": 36,
        "vocab_size": 49152,
        "mlp_bias": True,
        "attention_bias": True,
    },
}


def random_model(more: dict[str, Any], layers: int | None) -> LlamaForCausalLM:
    shape = SHAPE | more | ({} if layers is None else {"num_hidden_layers": layers})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def timed(
    model: LlamaForCausalLM, backend: str, prompts: list[list[int]]
) -> tuple[list[float], list[float], Tensor]:
    """Microseconds a token as a graph and eagerly, and the logits after the prompts."""
    patch(model, strict=True, backend=backend)
    generator = TokenGenerator(model)
    steps = generator.generate(prompts, [GREEDY] * BATCH, NEW + 3 * EAGER)
    for _ in range(3):  # the prefill, the step that captures, a replay
        next(steps)
    assert generator.decode_mode == "graph"
    assert generator.runner is not None

    def several() -> None:
        for _ in range(NEW // SAMPLES):
            next(steps)

    graph = [harness.timed_us(several) / (NEW // SAMPLES) for _ in range(SAMPLES)]
    step = generator.runner.steps()[-1]

    def eagerly() -> None:
        for _ in range(EAGER // 2):
            step._run_eagerly()
        torch.cuda.synchronize()

    eagerly()
    eager = [harness.timed_us(eagerly) / (EAGER // 2) for _ in range(SAMPLES)]
    steps.close()
    pages = -(-PROMPT // PAGE_SIZE)
    chunks = [Chunk(ids, 0, range(i * pages, (i + 1) * pages)) for i, ids in enumerate(prompts)]
    logits = generator.runner.prefill(chunks, pages).float()
    unpatch(model)
    return graph, eager, logits


def no_rows(_: object) -> dict[object, object]:
    """In the place of the tuned files."""
    return {}


def random_prompts(model: LlamaForCausalLM) -> list[list[int]]:
    prompts: list[list[int]] = torch.randint(1, model.config.vocab_size, (BATCH, PROMPT)).tolist()
    return prompts


def compare(name: str, more: dict[str, Any]) -> None:
    """Asserts that both paths give a model of the shape the same logits. It has 4 layers: the
    bfloat16 of more random ones drifts apart."""
    model = random_model(more, 4)
    prompts = random_prompts(model)
    ours, theirs = (timed(model, backend, prompts)[2] for backend in ("triton", "native"))
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error < 0.05, f"{name}: logits differ by {error:.3g}"


def measure(layers: int, quick: bool) -> list[harness.Row]:
    rows = []
    for name, more in MODELS.items():
        compare(name, more)
        model = random_model(more, layers if quick else None)
        prompts = random_prompts(model)
        ours, ours_eager, _ = timed(model, "triton", prompts)
        cuda, cuda_eager, _ = timed(model, "native", prompts)
        with mock.patch.multiple(tuning, _table=no_rows, _prefill_table=no_rows):
            start, _, _ = timed(model, "triton", prompts)
        rows += [
            harness.Row(f"{name}, a graph", ours, {"our CUDA": cuda, "start values": start}),
            harness.Row(f"{name}, eager", ours_eager, {"our CUDA": cuda_eager}),
        ]
        harness.print_rows(rows[-2:])
        del model
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    run_on_gpu("triton_step", __doc__, measure)
