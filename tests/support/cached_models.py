"""A model and its copy whose generate keeps keys and values in pages, and such caches to change."""

from __future__ import annotations

import copy

import torch
from families import VOCAB, tiny_model

from llamatelemetry.inference.kv_cache import optimize_kv_cache
from llamatelemetry.inference.packed_cache import PackedCache
from llamatelemetry.models.patching import patch
from llamatelemetry.models.pieces.arguments import CACHE_NAMES

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def cached_models(device, family="llama"):
    """(plain, ours) of a family, where nothing is an inference tensor."""
    plain = tiny_model(family, device)
    with torch.inference_mode(False), torch.no_grad():
        ours = copy.deepcopy(plain)
        patch(ours, strict=True)
        return plain, optimize_kv_cache(ours)


def prompt(device, length=9):
    return torch.randint(1, VOCAB, (2, length), device=device)


def cache_name(model):
    return next(name for name in CACHE_NAMES if name in model.forward._parameters)


def started(model, ids, mask=None):
    """A cache with ids in it."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids, attention_mask=mask, **GREEDY | {"max_new_tokens": 1}, return_dict_in_generate=True
    )
    cache = out[cache_name(model)]
    assert isinstance(cache, PackedCache)
    return cache
