"""The main job beside its peers: SmolLM2 Q4_1 on the CPU, one sequence, 128 tokens in, 128 out.

Peers on the same weights: transformers with dense bfloat16 weights, and llama.cpp where
llama-cpp-python is installed (README.md says how it was built for the figures there). All in one
process, taking turns; greedy; torch's and llama.cpp's thread counts are equal.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator

import harness
import torch

from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.dense import load_dense
from llamatelemetry.loading.find import find_model, load_model

PROMPT_TOKENS = NEW_TOKENS = 128
TEXT = (
    "The history of the city begins with a small settlement on the river, where traders met every "
    "spring. "
) * 20

Contestant = Callable[[], Iterator[int]]  # starts over and yields greedy tokens


def ours(engine: InferenceEngine, ids: list[int]) -> Contestant:
    def start() -> Iterator[int]:
        for (token,) in engine.generator.generate([ids], [GREEDY], NEW_TOKENS):
            yield token

    return start


def transformers_bf16(path: str, ids: list[int]) -> Contestant:
    from transformers import DynamicCache

    model = load_dense(path, device="cpu", dtype=torch.bfloat16)

    @torch.inference_mode()
    def start() -> Iterator[int]:
        cache = DynamicCache(config=model.config)
        step = torch.tensor([ids])
        while True:
            logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits
            step = logits[:, -1].argmax(-1, keepdim=True)
            yield int(step)

    return start


def llama_cpp(path: str, ids: list[int]) -> Contestant | None:
    try:
        from llama_cpp import Llama
    except ImportError:
        print("llama-cpp-python is not installed: measured without it")
        return None
    threads = torch.get_num_threads()
    llama = Llama(
        model_path=path,
        n_threads=threads,
        n_threads_batch=threads,
        n_ctx=PROMPT_TOKENS + NEW_TOKENS,
        n_batch=PROMPT_TOKENS,
        verbose=False,
    )

    def start() -> Iterator[int]:
        llama.reset()
        return llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)

    return start


def one_run(contestant: Contestant) -> tuple[float, float]:
    """Microseconds from the start to the first token, and for each token after it."""
    tokens = contestant()
    first = harness.timed_us(lambda: next(tokens))
    rest = harness.timed_us(lambda: list(itertools.islice(tokens, NEW_TOKENS - 1)))
    return first, rest / (NEW_TOKENS - 1)


def measure(path: str, quick: bool) -> list[harness.Row]:
    rounds = 2 if quick else 5
    engine = InferenceEngine(load_model(path, device="cpu"))
    ids = engine.tokenizer.encode(TEXT, add_special_tokens=False)[:PROMPT_TOKENS]
    made = {
        "ours": ours(engine, ids),
        "llama.cpp": llama_cpp(path, ids),
        "transformers bf16": transformers_bf16(path, ids),
    }
    contestants = {name: contestant for name, contestant in made.items() if contestant}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            sample = one_run(contestant)
            if number:  # the first round warms up
                samples[name].append(sample)
            time.sleep(0.05)  # lets the last contestant's threads fall asleep
    assert engine.generator.decode_mode == "recorded", engine.generator.decode_mode
    return [
        harness.Row(
            name=name,
            ours=[sample[column] for sample in samples["ours"]],
            baselines={
                peer: [sample[column] for sample in values]
                for peer, values in samples.items()
                if peer != "ours"
            },
        )
        for column, name in enumerate([f"first token after {PROMPT_TOKENS}", "one more token"])
    ]


def run_on_cpu(
    name: str, description: str | None, measure: Callable[[str, bool], list[harness.Row]]
) -> None:
    """The command line of a benchmark of a packaged model: measure takes its path and --quick."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="one or two rounds, no JSON")
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    rows = measure(str(find_model(arguments.model)), arguments.quick)
    harness.print_rows(rows)
    if not arguments.quick:
        print(f"wrote {harness.save(name, torch.device('cpu'), rows)}")


if __name__ == "__main__":
    run_on_cpu("generate", __doc__, measure)
