"""Quality of the quantised linears: perplexity of a text, ours beside transformers in float32.

Every token of each window but its first counts; no BOS. The figures in the docs are for 20 windows
of 1024 tokens of gensim/test/test_data/lee_background.cor, from the wheel of gensim 4.4.0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import harness
import torch

from llamatelemetry.loading.dense import load_dense
from llamatelemetry.loading.find import find_model, load_model
from llamatelemetry.models.patching import patch


@torch.inference_mode()
def perplexity(model: Any, ids: list[int], context: int) -> float:
    total, count = 0.0, 0
    for begin in range(0, len(ids), context):
        window = torch.tensor([ids[begin : begin + context]])
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        total, count = total + loss.double().sum().item(), count + loss.numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=20)
    arguments = parser.parse_args()
    path = str(find_model(arguments.model))
    raw = arguments.text.read_bytes()

    tokenizer = load_model(path, device="cpu").tokenizer
    ids = tokenizer.encode(raw.decode(), add_special_tokens=False)
    ids = ids[: arguments.windows * arguments.context]
    models = {
        "transformers float32": lambda: load_dense(path, device="cpu", dtype=torch.float32),
        "ours, default": lambda: _patched(path, exact=False),
        "ours, exact": lambda: _patched(path, exact=True),
    }
    result: dict[str, Any] = {
        "environment": harness.environment(),
        "text_sha256": hashlib.sha256(raw).hexdigest(),
        "context": arguments.context,
        "tokens": len(ids),
        "perplexity": {},
    }
    for name, make in models.items():
        result["perplexity"][name] = perplexity(make(), ids, arguments.context)
        print(f"{name}: {result['perplexity'][name]:.4f}", flush=True)
    target = harness.RESULTS / "perplexity-cpu.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {target.name}")


def _patched(path: str, *, exact: bool) -> Any:
    model = load_model(path, device="cpu", exact=exact).model
    patch(model)
    return model


if __name__ == "__main__":
    main()
