"""Rotary embedding, cache writes and the step's advance in Triton, bit for bit as the reference."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_refuses
from torch.library import opcheck

pytest.importorskip("triton")

from llamatelemetry.ops import reference
from llamatelemetry.triton_ops import cache

NUM_KV, PAGE, BLOCKS = 2, 4, 6


def close(a, b):
    """Within a rounding of the dtype: the interpreter cuts bits off where GPUs round."""
    unit = 2 * torch.finfo(a.dtype).eps
    torch.testing.assert_close(a, b, rtol=unit, atol=8 * unit)


def tables(device, dtype, rotary_dim):
    angles = torch.rand(20, rotary_dim, device=device) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def pages(device, dtype, head_dim):
    shape = (BLOCKS, PAGE, NUM_KV, head_dim)
    return torch.zeros(shape, device=device, dtype=dtype), torch.zeros(
        shape, device=device, dtype=dtype
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 96), (64, 16), (8, 8)])
def test_rotary_embedding(device, dtype, interleaved, head_dim, rotary_dim):
    qkv = torch.randn(3, 3, head_dim, device=device).to(dtype)
    cos, sin = tables(device, dtype, rotary_dim)
    positions = torch.tensor([7, 19, 7], device=device)
    for where in (positions, None):
        ours, theirs = qkv.clone(), qkv.clone()
        cache.rotary_embedding_(ours[:, :2], ours[:, 2:], cos, sin, where, interleaved)
        reference.rotary_embedding_(theirs[:, :2], theirs[:, 2:], cos, sin, where, interleaved)
        close(ours, theirs)


def test_positions_without_a_row_give_nan(device):
    q, k = torch.randn(2, 2, 8, device=device), torch.randn(2, 1, 8, device=device)
    cos, sin = tables(device, torch.float32, 8)
    cache.rotary_embedding_(q, k, cos, sin, torch.tensor([20, 1], device=device), False)
    assert q.isnan().all(-1).all(-1).tolist() == [True, False]


@pytest.mark.parametrize("head_dim", [64, 80])
def test_append_kv(device, dtype, head_dim):
    k, v = (torch.randn(4, NUM_KV, head_dim, device=device).to(dtype) for _ in range(2))
    slots = torch.tensor([5, -1, 23, 999], device=device)
    ours, theirs = pages(device, dtype, head_dim), pages(device, dtype, head_dim)
    cache.append_kv_(k, v, *ours, slots)
    reference.append_kv_(k, v, *theirs, slots)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 32)])
def test_rope_append_kv(device, dtype, normed, interleaved, head_dim, rotary_dim):
    qkv = torch.randn(3, 2 + 2 * NUM_KV, head_dim, device=device).to(dtype)
    cos, sin = tables(device, dtype, rotary_dim)
    positions = torch.tensor([3, 19, 8], device=device)
    slots = torch.tensor([1, -1, 23], device=device)
    weights = [torch.rand(head_dim, device=device).to(dtype) if normed else None] * 2
    for offset in (0.0, 1.0) if normed else (0.0,):
        ours, theirs = qkv.clone(), qkv.clone()
        a, b = pages(device, dtype, head_dim), pages(device, dtype, head_dim)
        more = (*weights, 1e-6, offset)
        cache.rope_append_kv_(ours, cos, sin, positions, interleaved, *a, slots, *more)
        reference.rope_append_kv_(theirs, cos, sin, positions, interleaved, *b, slots, *more)
        for x, y in zip((ours, *a), (theirs, *b), strict=True):
            close(x, y)


def test_advance_step(device):
    table = torch.tensor([[0, 1, -1], [2, -1, -1], [3, 4, 5]], dtype=torch.int32, device=device)
    positions = torch.tensor([2, 3, 11], device=device)
    state = {
        "input_ids": torch.tensor([7, 8, 9], device=device),
        "positions": positions,
        "slots": torch.tensor([2, 11, 23], device=device),
        "cache_seqlens": (positions + 1).int(),
        "offsets": torch.tensor([4, 5, 6], device=device),
    }
    for active in ([True, True, True], [False, True, True]):
        more = (torch.tensor([17, 18, 19], device=device), torch.tensor(active, device=device))
        ours, theirs = ([x.clone() for x in state.values()] for _ in range(2))
        cache.advance_step_(*ours, *more, table, PAGE)
        reference.advance_step_(*theirs, *more, table, PAGE)
        assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]


def test_opcheck(device):
    qkv = torch.randn(2, 5, 8, device=device)
    cos, sin = tables(device, torch.float32, 8)
    slots = torch.tensor([1, 2], device=device)
    both = pages(device, torch.float32, 8)
    ops = torch.ops.llamatelemetry_triton
    opcheck(ops.rotary_embedding_.default, (qkv[:, :3].clone(), qkv[:, 3:].clone(), cos, sin, None,
                                            False))  # fmt: skip
    opcheck(ops.append_kv_.default, (qkv[:, :2].clone(), qkv[:, 2:4].clone(), *both, slots))
    rest = (None, None, 1e-6, 0.0)
    opcheck(ops.rope_append_kv_.default, (qkv, cos, sin, slots, False, *both, slots, *rest))


def test_refuses(device):
    qkv = torch.randn(2, 5, 8, device=device)
    cos, sin = tables(device, torch.float32, 8)
    slots = torch.tensor([1, 2], device=device)
    both = pages(device, torch.float32, 8)
    few = (qkv[:, :4], cos, sin, None, False, *both, slots)
    assert_refuses(lambda: cache.rope_append_kv_(*few), "qkv", "heads of q", "4")
    odd = (qkv, cos[:, :3], sin[:, :3], None, False, *both, slots)
    assert_refuses(lambda: cache.rope_append_kv_(*odd), "even", "[20, 3]")
    assert_refuses(
        lambda: cache.append_kv_(qkv[:, :2], qkv[:, :2], *both, slots[:1]), "slot_mapping", "[1]"
    )
