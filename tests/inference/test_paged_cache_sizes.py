"""What a PagedKVCache is made of, and what it refuses to be made of."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry.inference.kv_cache import PagedKVCache

SMALL = {"num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 8, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"page_size": 8, "block_size": 4}, ValueError, "block_size must be page_size, 8, or left"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"num_blocks": 0}, ValueError, "num_blocks must be at least 1, got 0"),
        ({"dtype": torch.float64}, ValueError, "dtype must be float32, .* got torch.float64"),
        ({"head_size": 8}, TypeError, "sizes must be among .*head_dim.*, got head_size"),
    ],
    ids=["two sizes", "no tokens", "no blocks", "float64", "unknown"],
)
def test_what_a_paged_cache_cannot_be_made_of(given, error, sentence):
    with pytest.raises(error, match=f"^PagedKVCache: {sentence}"):
        PagedKVCache(**({"device": "cpu", "num_blocks": 2} | SMALL | given))


def test_one_size_of_two_names():
    cache = PagedKVCache(page_size=8, block_size=8, num_blocks=2, device="cpu", **SMALL)
    assert cache.pages.page_size == 8
