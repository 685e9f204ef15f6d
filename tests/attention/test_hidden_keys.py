"""What a window hides from every query of a sequence never matters, be it NaN, inf or in no page.

Behind a window pages are freed: what stands there is another sequence's, or nobody's.
"""

from __future__ import annotations

import pytest
import torch
from attention.flash_cases import device_of, random_qkv, random_varlen, run_varlen
from paged_cases import random_case

from llamatelemetry.ops import flash_attn
from llamatelemetry.ops.backends import flash_why_not

POISON = [torch.nan, torch.inf]
LENGTHS = [(1, 300), (5, 200), (40, 333), (130, 700), (300, 301)]
WINDOWS = [(0, 0), (20, 0), (67, 5), (130, -1)]


def hidden_keys(lengths, left) -> int:
    """How many keys stand in front of the first that any query sees."""
    return max(lengths[1] - lengths[0] - left, 0)


def assert_same(ours, clean):
    for a, b in zip(ours, clean, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_dense(backend, head_dim, lengths, window):
    dtype = torch.float32 if backend == "simt" else torch.float16
    device = device_of(backend, dtype)
    if backend.startswith("decode") and lengths[0] > 16:
        pytest.skip("few queries are what it is for")
    options = {"window_size": window, "backend": backend}
    q, k, v = (x.contiguous() for x in random_qkv(device, dtype, 2, lengths, (4, 2), head_dim))
    clean = flash_attn(q, k, v, **options)
    for poison in POISON:
        k[:, : hidden_keys(lengths, window[0])] = poison
        v[:, : hidden_keys(lengths, window[0])] = poison
        assert_same(flash_attn(q, k, v, **options), clean)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_packed(backend, window, alibi):
    dtype = torch.float32 if backend == "simt" else torch.float16
    device = device_of(backend, dtype)
    q, k, v, *starts = random_varlen(device, dtype, LENGTHS, (4, 2), 128, tail=0)
    slopes = torch.rand(4, device=device) / 4 if alibi else None
    options = {"window_size": window, "backend": backend, "alibi_slopes": slopes}
    clean = run_varlen(q, k, v, *starts, **options)
    for poison in POISON:
        for first, lengths in zip(starts[1].tolist(), LENGTHS, strict=False):
            hidden = slice(first, first + hidden_keys(lengths, window[0]))
            k[hidden] = v[hidden] = poison
        assert_same(run_varlen(q, k, v, *starts, **options), clean)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("page_size", [1, 8, 16, 64, 128, 256])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pages(backend, window, page_size, alibi):
    dtype = torch.float32 if backend == "simt" else torch.float16
    if reason := flash_why_not(backend, dtype, page_size=page_size):
        pytest.skip(f"{backend}: {reason}")
    device = torch.device("cpu" if backend == "cpu" else "cuda")
    sequences = LENGTHS[:2] if backend.startswith("decode") else LENGTHS
    case = random_case(device, dtype, sequences, (4, 2), 128, page_size)
    slopes = torch.rand(4, device=device) / 4 if alibi else None
    options = {"window_size": window, "causal": False, "backend": backend, "alibi_slopes": slopes}
    clean = case.run(**options)
    for poison in POISON:
        for b, lengths in enumerate(sequences):
            hidden = hidden_keys(lengths, window[0])
            pages = case.block_table[b, : hidden // page_size + 1].long()
            for cache in (case.k_cache, case.v_cache):
                rows = cache[pages].flatten(0, 1)
                rows[:hidden] = poison
                cache[pages] = rows.view(-1, *cache.shape[1:])
        assert_same(case.run(**options), clean)
    for b, lengths in enumerate(sequences):  # and freed: the table may say anything
        case.block_table[b, : hidden_keys(lengths, window[0]) // page_size] = 2**31 - 1
    assert_same(case.run(**options), clean)
