"""A cache in pages does what transformers' own does, whatever is done to it."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch
from cached_models import cache_name, cached_models, prompt, started
from transformers import DynamicCache

from llamatelemetry.inference import packed_rows, shared_pages
from llamatelemetry.inference.runner import StepRunner


def test_crop_and_selection(device):
    plain, ours = cached_models(device)
    name = cache_name(ours)
    ids, more = prompt(device, 12), prompt(device, 1)
    for change in (
        lambda cache: cache.crop(-5),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1], device=device)),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0], device=device)),
        lambda cache: cache.crop(-12),
    ):
        cache, theirs = started(ours, ids), DynamicCache(config=plain.config)
        plain(ids, **{name: theirs})
        change(theirs)
        kept = copy.deepcopy(cache)
        change(cache)
        for piece in (more, more.flip(0)):
            got, wanted = ours(piece, **{name: cache}), plain(piece, **{name: theirs})
            torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        assert cache.rows is not None
        assert kept.get_seq_length() == 12
        theirs = DynamicCache(config=plain.config)
        plain(ids, **{name: theirs})
        got, wanted = ours(more, **{name: kept}), plain(more, **{name: theirs})
        torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_changes_is_that_of_a_plain_cache(seed, device, monkeypatch):
    """Small pages, so that rows share, copy and outgrow them."""
    monkeypatch.setattr(shared_pages, "StepRunner", partial(StepRunner, page_size=4))
    monkeypatch.setattr(packed_rows, "_PAGES_AT_ONCE", 1)
    plain, ours = cached_models(device, "ministral" if seed % 2 else "llama")
    name, choose = cache_name(ours), random.Random(seed)
    mask = torch.ones(2, 6, dtype=torch.int64, device=device)
    mask[0, : 2 * (seed % 3)] = 0
    ids = prompt(device, 6)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    # All in full: transformers' own windows could not be cropped.
    theirs = DynamicCache(config=None)
    plain(ids, attention_mask=mask, position_ids=places, **{name: theirs})
    pairs = [(started(ours, ids, mask), theirs, mask)]
    for _ in range(24):
        i = choose.randrange(len(pairs))
        cache, theirs, mask = pairs[i]
        kind = choose.choice(["step", "step", "step", "several", "crop", "reorder", "copy"])
        if kind == "copy" and len(pairs) < 3:
            pairs.append((copy.deepcopy(cache), copy.deepcopy(theirs), mask))
        elif kind == "crop" and mask.shape[1] > 7:
            count = choose.randint(1, mask.shape[1] - 6)
            cache.crop(-count)
            theirs.crop(-count)
            pairs[i] = (cache, theirs, mask[:, :-count])
        elif kind == "reorder":
            order = torch.tensor([choose.randrange(2), choose.randrange(2)], device=device)
            cache.reorder_cache(order)
            theirs.reorder_cache(order)
            pairs[i] = (cache, theirs, mask[order])
        elif kind in ("step", "several"):
            more = prompt(device, 1 if kind == "step" else choose.randint(2, 7))
            mask = torch.nn.functional.pad(mask, (0, more.shape[1]), value=1)
            call = {
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1)[:, -more.shape[1] :],
            }
            got = ours(more, **call, **{name: cache}).logits
            wanted = plain(more, **call, **{name: theirs}).logits
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            pairs[i] = (cache, theirs, mask)
        assert pairs[i][0].get_seq_length() == pairs[i][1].get_seq_length()
        ours.forward.shared.pages().blocks.check()
    assert all(cache.rows is not None for cache, _, _ in pairs)


def test_padding_that_was_left_out_cannot_be_shown(device):
    _, ours = cached_models(device)
    mask = torch.ones(2, 9, dtype=torch.int64, device=device)
    mask[1, :2] = 0
    cache = started(ours, prompt(device), mask)
    shown = torch.ones(2, 10, dtype=torch.int64, device=device)
    for attention_mask in (shown, None):
        with pytest.raises(ValueError, match=r"attention_mask must hide .* got columns \[0, 1\]"):
            ours(prompt(device, 1), attention_mask=attention_mask, **{cache_name(ours): cache})
