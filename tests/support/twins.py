"""A model and its patched twin, and that both give the same."""

from __future__ import annotations

import copy

import torch
from families import VOCAB, tiny_model
from torch.testing import assert_close

from llamatelemetry.models.patching import patch

CALLS = 3  # the first finds new weights, the second takes them up


def ids_of(device):
    return torch.arange(3, 20, device=device).remainder(VOCAB).unsqueeze(0)


def twins(device, family="llama"):
    ours = tiny_model(family, device)
    theirs = copy.deepcopy(ours)
    report = patch(ours)
    ours(ids_of(device))
    return ours, theirs, report


def assert_alike(ours, theirs, device, **options):
    ids = ids_of(device)
    want = theirs(ids, **options).logits
    for _ in range(CALLS):
        assert_close(ours(ids, **options).logits, want, atol=2e-4, rtol=1e-4)
    return want
