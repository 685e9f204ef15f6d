"""A token of transformers' generate: a random model of Llama-3-8B's shape in bfloat16 on the GPU,
SmolLM2 Q4_1 on the CPU.

Ours is the patched model with optimize_kv_cache. Beside it: the model patched alone, plain
transformers (on the CPU with dense bfloat16 weights), and at one context on the GPU both with a
static cache, whose steps generate compiles. A sample is the time from one token to the next
as a streamer sees it, so it holds all that generate does; the first tokens, which capture, record
or compile, are left out.
"""

from __future__ import annotations

import argparse
import copy
import queue
import threading
from collections.abc import Callable
from typing import Any

import harness
import torch
from bench_generate import TEXT
from bench_prefill import SHAPE, random_llama
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from llamatelemetry.inference.kv_cache import optimize_kv_cache, restore_kv_cache
from llamatelemetry.loading.dense import load_dense
from llamatelemetry.loading.find import find_model, load_model
from llamatelemetry.models.patching import patch

LEFT_OUT, SAMPLES = 4, 12  # intervals between tokens
GPU_CASES = [(1, 128), (1, 4096), (1, 16000), (16, 1024), (1, 1024)]  # batch, context
COMPILED = (1, 1024)
CPU_CASES = [(1, 128), (4, 128)]

Contestant = Callable[[Tensor], list[float]]


class Intervals(BaseStreamer):
    """Microseconds between tokens, timed in a thread that waits for them."""

    def __init__(self) -> None:
        self._tokens: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._us: list[float] = []
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        got: list[Tensor | None] = [torch.empty(0)]
        while got[-1] is not None:
            self._us.append(harness.timed_us(lambda: got.append(self._tokens.get())))

    def put(self, value: Tensor) -> None:
        self._tokens.put(value)

    def end(self) -> None:
        self._tokens.put(None)

    def last(self, count: int) -> list[float]:
        self._thread.join()
        return self._us[-count - 1 : -1]  # the very last is the end


def contestant(model: Any, ours: bool = False, warm: int = LEFT_OUT, **options: Any) -> Contestant:
    """Takes samples of a model's generate."""

    def samples(ids: Tensor) -> list[float]:
        if ours:
            optimize_kv_cache(model)
        count = warm + SAMPLES
        streamer = Intervals()
        kept = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=kept, do_sample=False, pad_token_id=0, streamer=streamer,
            max_new_tokens=count + 1, **options,
        )  # fmt: skip
        assert out.shape[1] == ids.shape[1] + count + 1, "the model has ended before its time"
        if ours:
            modes = [step.mode for step in model.forward.shared.pages().runner.steps()]
            assert "eager" not in modes, modes
            restore_kv_cache(model)
        return streamer.last(SAMPLES)  # before them the prompt, its token, and what warms up

    return samples


def agree(made: dict[str, Any], ids: Tensor) -> None:
    """The first token of ours is one that the plain model takes for about the best."""
    ours, plain = made["ours"], made["transformers"]
    optimize_kv_cache(ours)
    token = ours.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[:, -1]
    restore_kv_cache(ours)
    with torch.inference_mode():
        logits = plain(input_ids=ids, logits_to_keep=1).logits[:, -1].float()
    taken = logits.gather(1, token[:, None]).squeeze(1)
    assert bool((taken >= logits.max(1)[0] - 0.1 * logits.abs().max(1)[0]).all())


def rows_of(
    contestants: dict[str, Contestant], cases: list[tuple[int, int]], rounds: int, prompts: Any
) -> list[harness.Row]:
    rows = []
    for batch, context in cases:
        ids = prompts(batch, context)
        samples: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, sample in contestants.items():
                if "compiled" not in name or (batch, context) == COMPILED:
                    samples.setdefault(name, []).extend(sample(ids))
        ours = samples.pop("ours")
        rows.append(harness.Row(f"batch {batch} at {context}", ours, samples))
        harness.print_rows(rows[-1:])
    return rows


def on_gpu(quick: bool) -> list[harness.Row]:
    plain = random_llama(2 if quick else SHAPE["num_hidden_layers"])
    plain.config.max_position_embeddings = SHAPE["max_position_embeddings"]
    patched, traced = copy.deepcopy(plain), copy.deepcopy(plain)
    for model in (patched, traced):
        assert not (refused := patch(model).refused), refused
    contestants = {
        "ours": contestant(patched, ours=True),
        "patched": contestant(patched),
        "transformers": contestant(plain),
        "compiled": contestant(plain, warm=8, cache_implementation="static"),
        "patched compiled": contestant(traced, warm=8, cache_implementation="static"),
    }

    def prompts(batch: int, context: int) -> Tensor:
        return torch.randint(1, SHAPE["vocab_size"], (batch, context), device="cuda")

    agree({"ours": patched, "transformers": plain}, prompts(1, 128))
    return rows_of(contestants, GPU_CASES[-1:] if quick else GPU_CASES, 1 if quick else 2, prompts)


def on_cpu(quick: bool) -> list[harness.Row]:
    path = str(find_model("smollm2"))
    loaded = load_model(path, device="cpu")
    model = loaded.model
    plain = load_dense(path, device="cpu", dtype=torch.bfloat16)
    assert not (refused := patch(model).refused), refused
    contestants = {
        "ours": contestant(model, ours=True),
        "patched": contestant(model),
        "transformers": contestant(plain),
    }

    def prompts(batch: int, context: int) -> Tensor:
        text = loaded.tokenizer.encode(TEXT, add_special_tokens=False)[:context]
        return torch.tensor([text] * batch)

    agree({"ours": model, "transformers": plain}, prompts(1, 128))
    return rows_of(contestants, CPU_CASES, 1 if quick else 4, prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: the GPU if there is one"
    )
    parser.add_argument("--quick", action="store_true", help="small, one round, no JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = (on_gpu if device == "cuda" else on_cpu)(arguments.quick)
    if not arguments.quick:
        print(f"wrote {harness.save('hf_generate', torch.device(device), rows)}")


if __name__ == "__main__":
    main()
