"""A tiny engine from a random GGUF file, and what its generator gives."""

from __future__ import annotations

import torch
from gguf_models import write_model

from llamatelemetry.inference.engine import InferenceEngine
from llamatelemetry.inference.sampling import GREEDY
from llamatelemetry.loading.find import load_model
from llamatelemetry.ops import QuantFormat

PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 1, 40, 22, 17, 6, 30]]
NEW_TOKENS = 12


def make_engine(tmp_path, device, family="llama", format=QuantFormat.Q8_0):
    path = tmp_path / "tiny.gguf"
    reference = write_model(path, family, format)
    loaded = load_model(path, device=device, dtype=torch.float32, exact=True)
    return InferenceEngine(loaded), reference.to(device)


def rows_of(engine, prompts, params=GREEDY, eos=()):
    """The tokens of each row, up to its end."""
    steps = list(engine.generator.generate(prompts, [params] * len(prompts), NEW_TOKENS, eos))
    columns = zip(*steps, strict=True)
    return [[token for token in column if token is not None] for column in columns]


def step_of(engine, batch=1):
    """The decode step that the last generation of so many rows used."""
    return engine.generator.runner.decode_step(batch, 1)


def all_free(engine):
    blocks = engine.generator.blocks
    blocks.check()
    return blocks.num_sequences == 0 and blocks.num_available == blocks.num_blocks
