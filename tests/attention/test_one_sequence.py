"""paged_attention of one sequence on a GPU: on Hopper clusters of blocks share its keys."""

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
@pytest.mark.parametrize("num_keys", [0, 1, 63, 64, 65, 1000, 1025, 4097, 20_000])
def test_lengths(dtype, num_keys):
    case = random_case("cuda", dtype, [(1, num_keys)], (32, 8), 128)
    assert_right(case)


@DTYPES
@pytest.mark.parametrize("heads", [(32, 4), (16, 16), (40, 8), (71, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("num_queries", [1, 3, 16])
def test_heads_and_queries(dtype, heads, num_queries):
    case = random_case("cuda", dtype, [(num_queries, 900)], heads, 64)
    assert_right(case, backend="decode")


@DTYPES
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_widths_and_pages(dtype, head_dim, page_size):
    assert_right(random_case("cuda", dtype, [(2, 1700)], (32, 8), head_dim, page_size))


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
@pytest.mark.parametrize("sequence", [(1, 1500), (5, 1500), (6, 4)], ids=str)
def test_options(dtype, options, sequence):
    assert_right(random_case("cuda", dtype, [sequence], (32, 8), 128), **options)


@DTYPES
def test_sinks(dtype):
    case = random_case("cuda", dtype, [(3, 1500)], (32, 8), 128)
    assert_right(case, sinks=torch.randn(32, device="cuda"))


@DTYPES
def test_what_a_window_hides_is_not_read(dtype):
    case = random_case("cuda", dtype, [(1, 1500)], (32, 8), 64, page_size=1)
    expected = assert_right(case, window_size=(700, 0))
    hidden = case.block_table[0, : 1499 - 700]
    case.k_cache[hidden] = torch.nan
    case.v_cache[hidden] = torch.nan
    for ours, theirs in zip(case.run(window_size=(700, 0)), expected, strict=True):
        assert torch.equal(ours, theirs)


@DTYPES
@pytest.mark.parametrize("seqlens", [(1, 3000), (3, 200), (7, 7)], ids=str)
def test_dense_keys(dtype, seqlens):
    q, k, v = (
        torch.randn(1, n, h, 64, device="cuda", dtype=dtype)
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
    case = random_case("cuda", dtype, [(1, 3000)], (32, 8), 128)
    first = case.run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(), strict=True))


def test_a_graph_replays_with_other_lengths():
    case, other = (
        random_case("cuda", torch.bfloat16, [(1, n)], (32, 8), 128, max_blocks=300)
        for n in (70, 4700)
    )
    pages = len(other.k_cache)
    caches = (
        torch.nn.functional.pad(c, (0, 0, 0, 0, 0, 0, 0, pages - len(c)))
        for c in (case.k_cache, case.v_cache)
    )
    first = (case.q, *caches, *case.tensors()[3:])
    assert_replays(lambda *x: paged_attention(*x, max_seqlen_q=1), first, other.tensors())


def test_lengths_that_the_kernel_ahead_writes():
    """The kernel guesses them before that one has ended."""
    num_keys, steps = 60, 80
    case = random_case("cuda", torch.bfloat16, [(1, num_keys + steps)], (32, 8), 128)
    lengths = case.cache_seqlens - steps
    ids, slots, offsets = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(3))
    positions = lengths.long() - 1
    active = torch.ones(1, dtype=torch.bool, device="cuda")
    q, k, v, table, _, starts = case.tensors()
    attend = {"max_seqlen_q": 1}

    def step():
        advance_step_(ids, positions, slots, lengths, offsets, ids, active, table, page_size=16)
        return paged_attention(q, k, v, table, lengths, starts, **attend)[0]

    outs = [step() for _ in range(steps)]
    torch.cuda.synchronize()
    for i, out in enumerate(outs):
        known = torch.full_like(lengths, num_keys + i + 1)
        assert torch.equal(out, paged_attention(q, k, v, table, known, starts, **attend)[0])
