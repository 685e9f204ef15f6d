"""Prompt lookup in ContinuousBatching beside the same batch without it.

On the CPU SmolLM2-135M answers questions about one text, greedily, answers of a given length, timed
from the last first token on; its steps of several rows round otherwise than those of one, so texts
may part at a near-tie. The stories hold nothing of their prompt.

On a GPU the model is random and of Llama-3-8B's shape, made to go round a cycle of tokens: each
token's embedding is the next one's row of the vocabulary projection, and what the layers add is
small. Of each draft FOUND are let through, and each token of it stays with the chance RIGHT, which
is how SmolLM2's drafts about the text were: so the steps, not the text, are what is measured.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from bench_prefill import SHAPE, random_llama

from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.ngrams import NgramIndex
from llamatelemetry.inference.request_handle import RequestHandle
from llamatelemetry.inference.speculation_config import SpeculationConfig
from llamatelemetry.loading.find import find_model, load_model
from llamatelemetry.models.patching import patch

ARTICLE = """\
The harbour of Linden was built in 1874, when the railway reached the coast. For thirty years \
coal from the inland mines left the town by sea, and the population grew from two thousand to \
twenty-six thousand people. The coal company built houses, a school and a hospital near the \
station. When the mines closed in 1931, most families left, and half of the houses near the \
station stood empty. In 1958 the town council bought the harbour for a small sum and opened it \
to fishing boats. The fishing fleet saved the town: by 1970 there were ninety boats, a market \
hall and a factory that froze the catch. Since 2004 fewer fish have been landed every year, \
and the council has turned to visitors. The old market hall is a museum of the coal trade now, \
the hospital is a hotel, and in summer a steam train runs from the station to the mines twice \
a day. Last year one hundred and ten thousand visitors came to Linden, and the council plans a \
second hotel near the market hall."""
ASKED = [
    "Summarise this text.",
    "Summarise this text in five sentences.",
    "Repeat the main points of this text.",
    "What happened in 1931 and in 1958? Answer with sentences of the text.",
    "Correct the spelling of this text and print it again.",
    "Rewrite this text for children.",
    "List all dates in this text, and what happened then.",
    "Why did the population grow, and why did families leave?",
]
OTHER = "Write a story about a robot who learns to paint."
NEW_TOKENS = {"cpu": 64, "cuda": 256}
CONTEXT, CYCLE = 1024, 256  # tokens of a prompt on a GPU, and after how many it repeats itself
FOUND, RIGHT = 0.64, 0.86
Tokens = list[list[int]]


class Contestant:
    """A batch that answers all prompts; the handles of the last time."""

    def __init__(self, engine: Any, prompts: Tokens, config: SpeculationConfig | None) -> None:
        self._batcher = ContinuousBatching(len(prompts), engine, speculation=config)
        self._prompts = prompts
        self._count = NEW_TOKENS[self._batcher.model.device.type]
        self.handles: list[RequestHandle] = []

    def sample_us(self) -> float:
        """Of a token of one request."""
        batcher = self._batcher
        self.handles = [
            batcher.submit(ids, None, self._count, ignore_eos=True) for ids in self._prompts
        ]
        while not all(handle.token_ids for handle in self.handles):
            batcher.step()
        begun = sum(len(handle.token_ids) for handle in self.handles)
        us = harness.timed_us(batcher.run)
        return us / (sum(map(len, self.texts)) - begun)

    @property
    def texts(self) -> Tokens:
        return [handle.token_ids for handle in self.handles]

    @property
    def drafts(self) -> str:
        stats = [handle.stats for handle in self.handles]
        right = sum(one.accepted_tokens for one in stats)
        return f"{right} of {sum(one.drafted_tokens for one in stats)} drafted tokens right"


def row(name: str, engine: Any, prompts: Tokens, rounds: int) -> harness.Row:
    ours = Contestant(engine, prompts, SpeculationConfig())
    plain = Contestant(engine, prompts, None)
    samples = harness.interleave({"ours": ours.sample_us, "plain": plain.sample_us}, rounds)
    same = sum(a == b for a, b in zip(ours.texts, plain.texts, strict=True))
    label = f"{name}: {ours.drafts}, {same} of {len(prompts)} texts the same"
    return harness.Row(label, samples["ours"], {"no speculation": samples["plain"]}, tokens=1)


def on_cpu(path: str, rounds: int) -> list[harness.Row]:
    engine = InferenceEngine(load_model(path, device="cpu"))
    asked = [engine.encode(f"{question}\n\n{ARTICLE}") for question in ASKED]
    return [
        row("1 answer about a text", engine, asked[:1], rounds),
        row("8 answers about a text", engine, asked, rounds),
        row("8 stories", engine, [engine.encode(OTHER)] * 8, rounds),
    ]


def going_round(layers: int) -> Any:
    """A random model whose next token is the next of a cycle."""
    model = random_llama(layers)
    tokens = torch.arange(SHAPE["vocab_size"], device="cuda")
    following = tokens // CYCLE * CYCLE + (tokens + 1) % CYCLE
    rows = model.get_input_embeddings().weight
    model.lm_head.weight.index_copy_(0, following, rows)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_(1e-3)
    patch(model)
    return model


def drafts_of(found: float, right: float) -> Callable[..., list[int]]:
    """NgramIndex.propose, whose drafts are let through and left as they are by these chances."""
    rng, propose = random.Random(0), NgramIndex.propose

    def spoiled(self: NgramIndex, tokens: Sequence[int], count: int) -> list[int]:
        draft = propose(self, tokens, count)
        if rng.random() > found:
            return []
        return [token if rng.random() < right else token ^ 1 for token in draft]

    return spoiled


def on_gpu(layers: int, rounds: int) -> list[harness.Row]:
    model, propose, rows = going_round(layers), NgramIndex.propose, []
    for batch in (1, 8):
        prompts = [[i * CYCLE + at % CYCLE for at in range(CONTEXT)] for i in range(batch)]
        for name, found, right in (("", FOUND, RIGHT), (", no draft right", 1.0, 0.0)):
            NgramIndex.propose = drafts_of(found, right)  # type: ignore[method-assign]
            try:
                rows.append(row(f"batch {batch}{name}", model, prompts, rounds))
            finally:
                NgramIndex.propose = propose  # type: ignore[method-assign]
            harness.print_rows(rows[-1:])
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="one round, two layers, no JSON")
    parser.add_argument("--model", default="smollm2", help="on the CPU")
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.device == "cpu":
        rows = on_cpu(str(find_model(arguments.model)), 1 if quick else 3)
        harness.print_rows(rows)
    elif torch.cuda.is_available():
        rows = on_gpu(2 if quick else SHAPE["num_hidden_layers"], 1 if quick else 3)
    else:
        print("speculation: needs a GPU, measured nothing")
        return
    if not quick:
        print(f"wrote {harness.save('speculation', torch.device(arguments.device), rows)}")


if __name__ == "__main__":
    main()
