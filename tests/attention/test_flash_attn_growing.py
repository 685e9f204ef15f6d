"""flash_attn where scores outgrow what a row's first scores were, by every implementation."""

from __future__ import annotations

import pytest
import torch
from attention.flash_cases import assert_lse, device_of, random_qkv, random_varlen, run_varlen

from llamatelemetry.ops import flash_attn, reference

# By 1 to 280 a block of 64 keys: what was summed before shrinks, at last to nothing.
GROWTHS = [20, 200, 600, 3000, -20, -200, -600, -3000]
SHAPES = [(64, 700), (64, 2300), (96, 700), (128, 700), (128, 1500), (192, 700), (256, 700)]
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (500, 30)}}


def grow(q, k, growth):
    """Adds 0 to growth to the scores, along the keys."""
    q[..., 0] = q.shape[-1] ** 0.5
    k[..., 0] = torch.linspace(0, growth, k.shape[-3], device=k.device)[:, None]


def assert_close(out, lse, q, k, v, **options):
    out64, lse64 = reference.flash_attn(q.double(), k.double(), v.double(), **options)
    _, lse32 = reference.flash_attn(q.float(), k.float(), v.float(), **options)
    room = 0.04 if q.dtype == torch.bfloat16 else 0.015  # scores of 3000 are right to 0.001
    torch.testing.assert_close(out.double(), out64, rtol=0, atol=room)
    assert_lse(lse, lse32, lse64, q.dtype)


@pytest.mark.parametrize(("head_dim", "num_keys"), SHAPES)
@pytest.mark.parametrize("mask", list(MASKS))
def test_scores_that_grow_along_the_keys(backend, dtype, head_dim, num_keys, mask):
    device = device_of(backend, dtype)
    q, k, v = random_qkv(device, dtype, 1, (200, num_keys), (2, 1), head_dim)
    for growth in GROWTHS:
        grow(q, k, growth)
        out, lse = flash_attn(q, k, v, backend=backend, **MASKS[mask])
        assert_close(out, lse, q, k, v, **MASKS[mask])


def test_rows_that_see_no_key_beside_rows_whose_scores_grow(backend, dtype):
    device = device_of(backend, dtype)
    q, k, v = random_qkv(device, dtype, 1, (300, 250), (2, 2), 128)
    for growth in GROWTHS:
        grow(q, k, growth)
        out, lse = flash_attn(q, k, v, causal=True, backend=backend)
        assert_close(out, lse, q, k, v, causal=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("other", ["nan", "large", "growing"])
def test_a_sequence_has_the_same_bits_whatever_its_neighbour_asks(backend, dtype, head_dim, other):
    """Rows of two sequences share a warp; what one needs done again leaves the other alone."""
    device = device_of(backend, dtype)
    lengths = [(50, 700), (50, 700)]
    q, k, v, starts, key_starts = random_varlen(device, dtype, lengths, (2, 2), head_dim, tail=0)
    q, k = 3 * q, 3 * k
    out, lse = run_varlen(q, k, v, starts, key_starts, backend=backend)
    if other == "nan":
        q[50:] = torch.nan
    elif other == "large":
        q[50:] *= 100
    else:
        grow(q[50:], k[700:], 3000)
    other_out, other_lse = run_varlen(q, k, v, starts, key_starts, backend=backend)
    assert torch.equal(other_out[:50], out[:50])
    assert torch.equal(other_lse[:, :50], lse[:, :50])
