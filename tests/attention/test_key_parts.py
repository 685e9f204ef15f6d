"""Hopper's kernels for few tiles over long keys: keys in parts, added by a second launch."""

from __future__ import annotations

import pytest
import torch
from attention.flash_cases import assert_right as assert_dense
from attention.flash_cases import random_qkv, random_varlen, run_varlen
from op_checks import assert_replays
from paged_cases import assert_right, random_case

from llamatelemetry.ops import paged_attention
from llamatelemetry.ops.backends import attention_choice

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
OPTIONS = [{}, {"window_size": (3000, 0)}, {"causal": False}, {"softcap": 20.0}]


def test_what_is_cut():
    long = {"seqlen_q": 128, "seqlen_k": 16384}
    assert "splits" in attention_choice("flash_attn", torch.float16, **long)
    assert "splits" in attention_choice("paged_attention", torch.bfloat16, **long)
    short = {"seqlen_q": 128, "seqlen_k": 2047}
    assert "splits" not in attention_choice("flash_attn", torch.float16, **short)


@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_chunks_over_pages(dtype, head_dim, options):
    sequences = [(128, 9000), (40, 300), (16, 4097), (0, 50), (1, 1), (100, 60)]
    case = random_case("cuda", dtype, sequences, (4, 2), head_dim)
    terms = {"sinks": torch.randn(4, device="cuda")}
    terms["alibi_slopes"] = torch.rand(6, 4, device="cuda") / 64
    assert_right(case, **options)
    assert_right(case, **options, **terms)


@DTYPES
@pytest.mark.parametrize("name", ["full", "causal", "window"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_dense(dtype, head_dim, name):
    options = {"causal": name == "causal", "sinks": torch.randn(4, device="cuda")}
    if name == "window":
        options["window_size"] = (2500, 30)
    assert_dense(*random_qkv("cuda", dtype, 2, (130, 5000), (4, 2), head_dim), "sm90", **options)


@DTYPES
def test_packed(dtype):
    lengths = [(130, 5000), (20, 30), (0, 9), (300, 2100)]
    q, k, v, *starts = random_varlen("cuda", dtype, lengths, (4, 2), 128)
    out, lse = run_varlen(q, k, v, *starts, causal=True)
    queries, keys = (x.tolist() for x in starts)
    for b in range(4):
        rows, seen = slice(*queries[b : b + 2]), slice(*keys[b : b + 2])
        if queries[b] == queries[b + 1]:
            continue
        one = (x[None] for x in (q[rows], k[seen], v[seen]))
        alone, alone_lse = assert_dense(*one, "sm90", causal=True)
        torch.testing.assert_close(out[rows], alone[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse[:, rows], alone_lse[0], rtol=1e-4, atol=1e-4)


def test_a_graph_replays_with_other_lengths():
    case = random_case("cuda", torch.bfloat16, [(100, 9000), (28, 200)], (8, 2), 128)
    lengths = torch.tensor([3000, 28], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 120, 128], dtype=torch.int32, device="cuda")

    def run(q, k_cache, v_cache, table, lengths, starts):
        return paged_attention(q, k_cache, v_cache, table, lengths, starts, max_seqlen_q=120)

    other = (*case.tensors()[:4], lengths, starts)
    assert_replays(run, case.tensors(), other)
    assert_replays(run, other, case.tensors())
