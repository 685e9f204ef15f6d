"""A model and its patched twin, and the tokens that transformers gives while the model changes."""

from __future__ import annotations

import copy
import inspect

import torch
from families import VOCAB, quantise_, tiny_model
from transformers import DynamicCache

from llamatelemetry.models.patching import patch
from llamatelemetry.models.pieces.arguments import CACHE_NAMES

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 97 % VOCAB, 9, 3, 2]
COUNT, SOON = 12, 5


def stepwise(model, change=None, at=SOON, prompt=PROMPT):
    """Tokens of transformers' forward; change comes before token number at."""
    parameters = inspect.signature(model.forward).parameters
    name = next(name for name in CACHE_NAMES if name in parameters)
    tokens, cache, ids = [], DynamicCache(config=model.config), [prompt]
    with torch.no_grad():
        while len(tokens) < COUNT:
            if change is not None and len(tokens) == at:
                change(model)
            ids = torch.tensor(ids, device=model.device)
            logits = model(ids, **{name: cache}, use_cache=True).logits
            tokens.append(int(logits[0, -1].argmax()))
            ids = [[tokens[-1]]]
    return tokens


def twins(family="llama", device="cpu", quantised=False):
    model = tiny_model(family, device)
    if quantised:
        with torch.inference_mode(False), torch.no_grad():
            quantise_(model)
    with torch.inference_mode(False), torch.no_grad():
        ours = copy.deepcopy(model)
    patch(ours)
    return model, ours
