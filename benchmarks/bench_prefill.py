"""Time to the first token of a long prompt: a random model of Llama-3-8B's shape in bfloat16.

Ours twice, the engine's packed prefill and the patched model under transformers' own forward,
beside plain transformers with sdpa on equal weights, in turns.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import harness
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.patching import patch

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
}


@torch.inference_mode()
def assert_alike(
    plain: LlamaForCausalLM, patched: LlamaForCausalLM, ids: Tensor, token: int
) -> None:
    """Logits within a tenth of the largest after all layers in bfloat16, and our token among the
    best of theirs."""
    ours, theirs = (
        model(input_ids=ids[None], logits_to_keep=1).logits[0, -1].float()
        for model in (patched, plain)
    )
    largest = theirs.abs().max()
    assert (ours - theirs).abs().max() <= 0.1 * largest
    assert theirs[token] >= theirs.max() - 0.1 * largest


@torch.inference_mode()
def first_token(model: LlamaForCausalLM, ids: Tensor) -> int:
    return int(model(input_ids=ids[None], logits_to_keep=1, use_cache=True).logits.argmax())


def random_llama(layers: int) -> LlamaForCausalLM:
    """Of SHAPE but for its layers, in bfloat16 on the GPU, with torch's attention."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        config = LlamaConfig(**SHAPE | {"num_hidden_layers": layers}, attn_implementation="sdpa")
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def measure(layers: int, quick: bool) -> list[harness.Row]:
    seqlen, rounds = 8192, 2 if quick else 10
    plain = random_llama(layers)
    patched = copy.deepcopy(plain)
    report = patch(patched)
    assert not report.refused, report.refused
    generator = TokenGenerator(patched)
    rows = []
    for length in (seqlen // 4, seqlen):
        ids = torch.randint(0, SHAPE["vocab_size"], (length,), device="cuda")
        prompt = ids.tolist()

        def engine(prompt: list[int] = prompt) -> int:
            (token,) = next(generator.generate([prompt], [GREEDY], 2))
            assert token is not None
            return token

        contestants: dict[str, Callable[[], int]] = {
            "engine": engine,
            "patched": lambda ids=ids: first_token(patched, ids),
            "transformers sdpa": lambda ids=ids: first_token(plain, ids),
        }
        assert_alike(plain, patched, ids, engine())
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name, contestant in contestants.items():
                torch.cuda.synchronize()
                us = harness.timed_us(contestant)
                if number:  # the first round warms up
                    samples[name].append(us)
        theirs = samples.pop("transformers sdpa")
        rows += [
            harness.Row(f"{name} {length} tokens", us, {"transformers sdpa": theirs})
            for name, us in samples.items()
        ]
    return rows


def run_on_gpu(
    name: str, description: str | None, measure: Callable[[int, bool], list[harness.Row]]
) -> None:
    """The command line of a benchmark of a whole model: measure takes layers and --quick."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="two layers, two rounds, no JSON")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print(f"{name}: needs a GPU, measured nothing")
        return
    rows = measure(2 if quick else SHAPE["num_hidden_layers"], quick)
    harness.print_rows(rows)
    if not quick:
        print(f"wrote {harness.save(name, torch.device('cuda'), rows)}")


if __name__ == "__main__":
    run_on_gpu("prefill", __doc__, measure)
