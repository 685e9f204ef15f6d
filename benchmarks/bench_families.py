"""A token of the engine for models of other families than Llama, beside transformers' eager one.

Random models in bfloat16 of the shapes of five that people run, 7 to 9 billion parameters each: a
whole greedy step after a prompt, as bench_ablation.py measures it. Before it is timed, the engine's
first token must be one that the plain model takes for about the best.
"""

from __future__ import annotations

import argparse
import copy
import gc
from statistics import median
from typing import Any

import harness
import torch
import transformers
from bench_ablation import BASE, by_engine, by_generate

from llamatelemetry.inference.generation import TokenGenerator
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.models.patching import patch

# The family's config, and the sizes of the published model.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-8B": (
        "Qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
        },
    ),
    "Gemma-2-9B": (
        "Gemma2",
        {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 256000,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "OLMo-2-7B": (
        "Olmo2",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "vocab_size": 100352,
        },
    ),
    "GLM-4-9B": (
        "Glm4",
        {
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "vocab_size": 151552,
            "attention_bias": True,
        },
    ),
    "Granite-3.3-8B": (
        "Granite",
        {
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "vocab_size": 49159,
            "attention_multiplier": 0.0078125,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "logits_scaling": 16.0,
        },
    ),
}
_COMMON = {
    "num_attention_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_SMALL = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "vocab_size": 1024,
}
PROMPT = 512


def random_models(family: str, sizes: dict[str, Any], device: str) -> tuple[Any, Any]:
    """A model of transformers' own under eager attention, and its twin under ours."""
    config = getattr(transformers, f"{family}Config")(**_COMMON | sizes)
    config._attn_implementation = "eager"
    with torch.device(device):
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.eval().requires_grad_(False)
    plain.generation_config.eos_token_id = None
    ours = copy.deepcopy(plain)
    report = patch(ours)
    if report.refused or report.not_packed:
        raise RuntimeError(f"{family}: {report.refused or report.not_packed}")
    return plain, ours


def agree(plain: Any, ours: Any, prompt: list[int]) -> None:
    """The engine's first token is one that the plain model takes for about the best."""
    (token,) = next(TokenGenerator(ours).generate([prompt], [GREEDY], 1))
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=plain.device)
        logits = plain(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
    assert token is not None, "an active row has a token"
    assert logits[token] >= logits.max() - 0.1 * logits.abs().max(), "another token"


def row(name: str, device: str, quick: bool) -> harness.Row:
    """Microseconds of one more token, the two models in turns."""
    family, sizes = SHAPES[name]
    plain, ours = random_models(family, sizes | _SMALL if quick else sizes, device)
    rounds, steps, length = (1, 3, 16) if quick else (4, 17, PROMPT)
    prompt = torch.randint(1, plain.config.vocab_size, (length,)).tolist()
    agree(plain, ours, prompt)
    contestants = {"ours": by_engine(ours), BASE: by_generate(plain)}
    samples: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for number in range(rounds + 1):
        for contestant, us in contestants.items():
            _, step = us([prompt], steps)
            if number:  # the first round warms up
                samples[contestant].append(step)
    return harness.Row(f"{name}, batch 1 after {length}", samples.pop("ours"), samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="two narrow layers, no JSON")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("families: needs a GPU, measured nothing")
        return
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    rows = []
    for name in SHAPES:
        rows.append(row(name, arguments.device, arguments.quick))
        harness.print_rows(rows[-1:])
        gc.collect()  # pieces and modules hold each other
        torch.cuda.empty_cache()
    least = min(rows, key=lambda row: row.speedup(BASE))
    print(f"least: {least.name}, {least.speedup(BASE):.2f} times, {median(least.ours):.0f} us")
    if not arguments.quick:
        print(f"wrote {harness.save('families', torch.device(arguments.device), rows)}")


if __name__ == "__main__":
    main()
