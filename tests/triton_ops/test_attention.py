"""Attention in Triton: any length, groups, windows, softcap, sinks, pages, parts of the keys."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from closeness import assert_close
from op_checks import assert_refuses
from torch.library import opcheck

pytest.importorskip("triton")

from llamatelemetry.ops import reference
from llamatelemetry.triton_ops import attention
from llamatelemetry.triton_ops.attention import AttentionConfig
from llamatelemetry.triton_ops.launch import has_tma

SCORES = {
    "plain": {},
    "window": {"window_size": (4, -1)},
    "both sides": {"window_size": (5, 3), "causal": False},
    "softcap": {"softcap": 2.0},
    "full": {"causal": False},
    "sinks": {"sinks": True},
}


def options_of(kind, heads, device):
    more = {"softmax_scale": 0.125, "causal": True, "window_size": (-1, -1), "softcap": 0.0}
    more |= SCORES[kind]
    has_sinks = more.pop("sinks", False)
    sinks = torch.randn(heads, device=device) if has_sinks else None
    left, right = more["window_size"]
    ours = (more["softmax_scale"], more["causal"], left, right, more["softcap"])
    return more | {"sinks": sinks}, ours, sinks


def starts_of(lengths, device):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def random_qkv(total, heads, heads_kv, head_dim, device, dtype):
    qkv = torch.randn(total, heads + 2 * heads_kv, head_dim, device=device).to(dtype)
    return qkv.split([heads, heads_kv, heads_kv], 1)  # rows that lie apart, as a merged linear's


def of_device(device, lengths):
    """The interpreter takes a second for what a GPU does at once: a third of the keys there."""
    return lengths if device.type == "cuda" else [n if n < 10 else n // 3 for n in lengths]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("heads", "heads_kv", "head_dim"), [(4, 2, 64), (3, 1, 40)])
def test_prefill(device, dtype, kind, heads, heads_kv, head_dim):
    lengths = of_device(device, [1, 3, 0, 127])
    q, k, v = random_qkv(sum(lengths), heads, heads_kv, head_dim, device, dtype)
    starts = starts_of(lengths, device)
    options, ours, sinks = options_of(kind, heads, device)
    out = attention.flash_attn_varlen(q, k, v, starts, max(lengths), *ours, sinks)
    exact, _ = reference.flash_attn_varlen(
        q.double(), k.double(), v.double(), starts, starts, **options
    )
    theirs, _ = reference.flash_attn_varlen(q, k, v, starts, starts, **options)
    assert_close(out, theirs, exact)


def paged(lengths, queries, heads, heads_kv, head_dim, page_size, device, dtype):
    width = max(-(-n // page_size) for n in lengths) + 1
    order = torch.randperm(len(lengths) * width).view(len(lengths), width)
    shape = (len(lengths) * width, page_size, heads_kv, head_dim)
    k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    q = torch.randn(sum(queries), heads, head_dim, device=device).to(dtype)
    table = order.to(torch.int32)
    for row, length in enumerate(lengths):
        used = -(-length // page_size)
        k[table[row, used:].long()] = torch.nan  # never matters
        v[table[row, used:].long()] = torch.nan
        table[row, used:] = -1
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return q, k, v, table.to(device), seqlens, starts_of(queries, device)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("lengths", "queries", "page_size"),
    [([1, 200], [1, 1], 16), ([7, 130], [3, 5], 5), ([90], [40], 16)],
)
def test_paged(device, dtype, kind, lengths, queries, page_size):
    heads, heads_kv, head_dim = 6, 2, 64
    lengths, queries = of_device(device, lengths), of_device(device, queries)
    args = paged(lengths, queries, heads, heads_kv, head_dim, page_size, device, dtype)
    options, ours, sinks = options_of(kind, heads, device)
    out = attention.paged_attention(*args, max(queries), *ours, sinks)
    wide = [x.double() if x.is_floating_point() else x for x in args]
    exact, _ = reference.paged_attention(*wide, **options)
    theirs, _ = reference.paged_attention(*args, **options)
    assert_close(out, theirs, exact)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("splits", [2, 5])
def test_parts_of_the_keys(device, monkeypatch, kind, splits):
    """However many parts, some of them empty, the result is that of one."""
    args = paged([100, 3], [1, 2], 4, 2, 64, 16, device, torch.float32)
    _, ours, sinks = options_of(kind, 4, device)
    outs = []
    for n in (1, splits):
        config = AttentionConfig(16, 32, 4, 2, n)
        monkeypatch.setattr(attention, "attention_config", lambda *_, c=config, **__: c)
        outs.append(attention.paged_attention(*args, 2, *ours, sinks))
    torch.testing.assert_close(*outs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["plain", "window", "full", "sinks"])
def test_tiles_read_by_descriptors(device, monkeypatch, kind):
    """As by pointers, with no number where the next sequence begins."""
    if device.type == "cuda" and not has_tma(device):
        pytest.skip("needs a GPU with descriptors")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = [40, 9]
    qkv = random_qkv(sum(lengths), 4, 2, 64, device, dtype)
    for x in qkv:
        x[lengths[0] :] = torch.nan
    pages = paged([70, 33], [20, 1], 4, 2, 64, 32, device, dtype)
    _, ours, sinks = options_of(kind, 4, device)
    dense, from_pages = [], []
    for tma in (False, True):
        config = AttentionConfig(16, 32, 4, 2, 1, tma)
        monkeypatch.setattr(attention, "attention_config", lambda *_, c=config, **__: c)
        starts = starts_of(lengths, device)
        dense.append(attention.flash_attn_varlen(*qkv, starts, lengths[0], *ours, sinks)[:40])
        from_pages.append(attention.paged_attention(*pages, 20, *ours, sinks))
    for found in (dense, from_pages):
        assert found[0].isfinite().all()
        limit = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
        torch.testing.assert_close(*found, **limit)


def test_opcheck(device):
    q, k, v = random_qkv(5, 4, 2, 32, device, torch.float32)
    starts = starts_of([2, 3], device)
    ops = torch.ops.llamatelemetry_triton
    scores = (0.3, True, -1, -1, 0.0, None)
    opcheck(ops.flash_attn_varlen.default, (q, k, v, starts, 3, *scores))
    args = paged([7, 3], [1, 1], 4, 2, 32, 16, device, torch.float32)
    args = [x.nan_to_num() if x.is_floating_point() else x for x in args]
    opcheck(ops.paged_attention.default, (*args, 1, *scores))


def test_refuses(device):
    q, k, v = random_qkv(5, 4, 2, 32, device, torch.float32)
    starts, scores = starts_of([5], device), (0.3, True, -1, -1, 0.0)
    run = attention.flash_attn_varlen
    assert_refuses(lambda: run(q[:, :3], k, v, starts, 5, *scores), "heads", "2", "3")
    assert_refuses(lambda: run(q, k[:4], v[:4], starts, 5, *scores), "k", "[5, 2, 32]")
    assert_refuses(lambda: run(q, k, v, starts, 5, *scores[:4], -1.0), "softcap", "-1.0")
    assert_refuses(lambda: run(q, k, v, starts, 5, *scores, q[0, :3, 0]), "sinks", "[4]", "[3]")
