"""A decode step of the engine as a CUDA graph beside the same step kernel by kernel, over batches.

Random models in bfloat16. Both contestants read one paged cache; they take turns, and their tokens
are compared first. What a graph saves is the time in which the GPU waits for the CPU.
"""

from __future__ import annotations

import harness
import torch
from bench_ablation import SHAPES
from bench_prefill import SHAPE, run_on_gpu
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.inference.decode_step import DecodeStep
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.inference.sampling import GREEDY, sampling_tensors
from llamatelemetry.inference.step import Chunk
from llamatelemetry.models.patching import patch

BATCHES = (1, 2, 4, 8, 32)
CONTEXT = 512  # tokens of each sequence
STEPS = 8  # that one sample is the mean of


class EagerStep(DecodeStep):
    """The same step, whose kernels the CPU launches each time."""

    def _capture(self) -> None:
        self._replay = self._run_eagerly
        self._run_eagerly()


def step_of(
    runner: StepRunner, kind: type[DecodeStep], batch: int, tables: list[list[int]]
) -> DecodeStep:
    """A step of a kind at the end of random prompts, warmed up."""
    step = runner.step_of(kind, batch, len(tables[0]))
    sampling = sampling_tensors([GREEDY] * batch, runner.pages.device)
    rows = [Chunk([7 + row], CONTEXT, table) for row, table in enumerate(tables)]
    step.load(kind, rows, sampling, [0] * batch, [True] * batch)
    return step


def assert_alike(graph: DecodeStep, eager: DecodeStep) -> None:
    """Both draw the same three tokens of each row."""
    for _ in range(3):
        ours, theirs = graph.run().tolist(), eager.run().tolist()
        assert ours == theirs, f"tokens differ: {ours} of the graph, {theirs} eagerly"
    assert (graph.mode, eager.mode) == ("graph", "eager"), (graph.mode, eager.mode)


@torch.inference_mode()
def rows_of(name: str, model: LlamaForCausalLM, rounds: int) -> list[harness.Row]:
    most = CONTEXT + (rounds + 2) * STEPS + 8
    runner, rows = StepRunner(model), []
    blocks = -(-most // runner.pages.page_size)
    runner.ready(most, max(BATCHES) * blocks, keep=False)
    for layer in runner.pages.layers:
        for pages in layer:
            pages.normal_()
    for batch in BATCHES:
        tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(batch)]
        steps = [step_of(runner, kind, batch, tables) for kind in (DecodeStep, EagerStep)]
        assert_alike(*steps)

        def several(step: DecodeStep) -> None:
            for _ in range(STEPS):
                step.run().tolist()  # as a generation looks at each token

        samplers = {
            kind: lambda step=step: harness.timed_us(lambda: several(step)) / STEPS
            for kind, step in zip(("graph", "eager"), steps, strict=True)
        }
        samples = harness.interleave(samplers, rounds)
        label = f"{name} batch {batch} at {CONTEXT}"
        rows.append(harness.Row(label, samples["graph"], {"eager": samples["eager"]}))
    return rows


def measure(layers: int, quick: bool) -> list[harness.Row]:
    rounds, rows = 2 if quick else 5, []
    torch.set_default_dtype(torch.bfloat16)
    for name, shape in SHAPES.items():
        count = min(layers, int(shape.get("num_hidden_layers", SHAPE["num_hidden_layers"])))
        with torch.device("cuda"):
            config = LlamaConfig(**shape | {"num_hidden_layers": count})
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
        report = patch(model)
        assert not report.refused, report.refused
        rows += rows_of(name, model, rounds)
        del model
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    run_on_gpu("graphs", __doc__, measure)
