"""paged_attention of up to 64 rows of a key head on a GPU: on Hopper clusters of blocks share the
keys of few sequences, multiplied by wgmma."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_replays
from paged_cases import assert_right, random_case
from tolerance import assert_within_2x

from llamatelemetry.ops import advance_step_, flash_attn, paged_attention, reference

pytestmark = [pytest.mark.gpu, pytest.mark.sm80]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])


@DTYPES
@pytest.mark.parametrize(
    "lengths",
    [
        [0],
        [1],
        [16],
        [64],
        [65],
        [1000],
        [4097],
        [20_000],
        [2000, 0],
        [70, 5000, 16],
        [1, 129, 64, 900],
    ],
    ids=str,
)
def test_lengths(dtype, lengths):
    assert_right(random_case("cuda", dtype, [(16, n) for n in lengths], (32, 8), 128))


@DTYPES
@pytest.mark.parametrize("heads", [(32, 8), (32, 4), (16, 16), (40, 8), (64, 1)], ids=str)
@pytest.mark.parametrize("num_queries", [5, 9, 17, 64])
def test_heads_and_queries(dtype, heads, num_queries):
    sequences = [(num_queries, 900), (num_queries - 1, 1500)]
    assert_right(random_case("cuda", dtype, sequences, heads, 64), backend="decode")


@DTYPES
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128])
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_widths_and_pages(dtype, head_dim, page_size):
    assert_right(random_case("cuda", dtype, [(7, 1700), (16, 333)], (32, 8), head_dim, page_size))


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (0, 0)},
        {"window_size": (300, 0)},
        {"window_size": (300, 1), "causal": False},
        {"window_size": (-1, 2), "causal": False},
        {"softcap": 20.0},
        {"softmax_scale": -0.1},
    ],
    ids=str,
)
def test_options(dtype, options):
    sequences = [(16, 1500), (0, 30), (6, 4), (5, 700)]
    assert_right(random_case("cuda", dtype, sequences, (32, 8), 128), backend="decode", **options)


@DTYPES
def test_sinks(dtype):
    case = random_case("cuda", dtype, [(16, 1500), (3, 20)], (32, 8), 128)
    assert_right(case, sinks=torch.randn(32, device="cuda"))


@DTYPES
def test_what_a_window_hides_is_not_read(dtype):
    case = random_case("cuda", dtype, [(8, 1500)], (32, 8), 64, page_size=1)
    expected = assert_right(case, window_size=(700, 0))
    hidden = case.block_table[0, : 1492 - 700]
    case.k_cache[hidden] = torch.nan
    case.v_cache[hidden] = torch.nan
    for ours, theirs in zip(case.run(window_size=(700, 0)), expected, strict=True):
        assert torch.equal(ours, theirs)


@DTYPES
@pytest.mark.parametrize("seqlens", [(16, 3000), (9, 200), (7, 7)], ids=str)
def test_dense_keys(dtype, seqlens):
    q, k, v = (
        torch.randn(2, n, h, 64, device="cuda", dtype=dtype)
        for n, h in zip((seqlens[0], seqlens[1], seqlens[1]), (32, 8, 8), strict=True)
    )
    ours = flash_attn(q, k, v, backend="decode", causal=True)
    in_32, in_64 = (
        reference.flash_attn(q.to(d), k.to(d), v.to(d), causal=True)
        for d in (torch.float32, torch.float64)
    )
    assert_within_2x(ours[0], in_32[0].to(dtype), in_64[0])
    assert_within_2x(ours[1], in_32[1], in_64[1])


@DTYPES
def test_it_gives_the_same_bits_each_time(dtype):
    case = random_case("cuda", dtype, [(16, 3000), (12, 4000)], (32, 8), 128)
    first = case.run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(), strict=True))


def test_a_graph_replays_with_other_lengths():
    case, other = (
        random_case("cuda", torch.bfloat16, [(16, n), (16, m)], (32, 8), 128, max_blocks=300)
        for n, m in ((70, 16), (4700, 130))
    )
    pages = len(other.k_cache)
    caches = (
        torch.nn.functional.pad(c, (0, 0, 0, 0, 0, 0, 0, pages - len(c)))
        for c in (case.k_cache, case.v_cache)
    )
    first = (case.q, *caches, *case.tensors()[3:])
    assert_replays(lambda *x: paged_attention(*x, max_seqlen_q=16), first, other.tensors())


def test_lengths_that_the_kernel_ahead_writes():
    """The kernel guesses them before that one has ended."""
    num_keys, steps = 60, 80
    case = random_case("cuda", torch.bfloat16, [(16, num_keys + steps)], (32, 8), 128)
    lengths = case.cache_seqlens - steps
    ids, slots, offsets = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(3))
    positions = lengths.long() - 1
    active = torch.ones(1, dtype=torch.bool, device="cuda")
    q, k, v, table, _, starts = case.tensors()
    attend = {"max_seqlen_q": 16}

    def step():
        advance_step_(ids, positions, slots, lengths, offsets, ids, active, table, page_size=16)
        return paged_attention(q, k, v, table, lengths, starts, **attend)[0]

    outs = [step() for _ in range(steps)]
    torch.cuda.synchronize()
    for i, out in enumerate(outs):
        known = torch.full_like(lengths, num_keys + i + 1)
        assert torch.equal(out, paged_attention(q, k, v, table, known, starts, **attend)[0])
