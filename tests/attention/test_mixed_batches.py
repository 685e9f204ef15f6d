"""Rows that decode beside chunks in one call: each kind has a launch of its own, on Hopper by what
it gains, and on every GPU where the caller says where keys are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_checks import assert_replays
from paged_cases import Case, assert_right, eight_bit, random_case

from llamatelemetry.ops import paged_attention

# (queries, keys): rows that decode, drafts on both sides of what decodes, chunks, nothing.
SEQUENCES = [(1, 5000), (200, 1000), (0, 50), (1, 1), (16, 700), (4, 900), (5, 64), (1, 130)]
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.sm80)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16], ids=lambda d: str(d)[6:])
SPLITS = pytest.mark.parametrize("splits", [{"split_size": 256}, {"num_splits": 5}], ids=str)


@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (20, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"split_size": 128}, {"num_splits": 3}], ids=str)
def test_results(device, dtype, heads, options):
    case = random_case(device, dtype, SEQUENCES, heads, 128)
    assert_right(case, **options)
    assert_right(case, window_size=(300, 0), sinks=torch.randn(heads[0], device=device), **options)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_widths_and_score_terms(device, dtype, head_dim):
    case = random_case(device, dtype, SEQUENCES * 5, (4, 2), head_dim)
    slopes = torch.rand(len(SEQUENCES) * 5, 4, device=device) / 64
    assert_right(case, alibi_slopes=slopes, softcap=20.0)


def test_one_kind_alone(device, dtype):
    chunks = random_case(device, dtype, [(100, 1000), (70, 3000), (30, 31)], (8, 2), 128)
    assert_right(chunks)
    rows = random_case(device, dtype, [(1, 3000)] * 3, (8, 2), 128)
    assert_right(replace(rows, max_seqlen_q=100))  # no sequence has more


def test_few_tiles_over_long_keys(device, dtype):
    sequences = [(1, 9000), (40, 5000), (1, 300), (0, 7), (2, 4097)]
    assert_right(random_case(device, dtype, sequences, (4, 2), 128))


def of_sequences(case: Case, which: list[int]) -> Case:
    starts = case.cu_seqlens_q.tolist()
    counts = [starts[b + 1] - starts[b] for b in which]
    at = torch.tensor(which, device=case.q.device)
    lengths = torch.tensor([0, *counts], device=at.device)
    return replace(
        case,
        q=torch.cat([case.q[starts[b] : starts[b + 1]] for b in which]),
        block_table=case.block_table[at],
        cache_seqlens=case.cache_seqlens[at],
        cu_seqlens_q=lengths.cumsum(0).int(),
        max_seqlen_q=max(counts),
    )


def assert_each_kind_alone_gives_its_bits(case, **options):
    """case: of MIXED. Each kind is run with no more queries a sequence than it has, and with many
    allowed, some of them one sequence."""
    out, lse = case.run(**options)
    for which in [[0, 3, 7], [5, 6, 8, 0], [1, 4], [9], [7]]:
        alone = of_sequences(case, which)
        for longest in (alone.max_seqlen_q, 1000):
            one_out, one_lse = replace(alone, max_seqlen_q=longest).run(**options)
            first = 0
            for b in which:
                rows = slice(*case.cu_seqlens_q[b : b + 2].tolist())
                last = first + rows.stop - rows.start
                assert torch.equal(one_out[first:last], out[rows])
                assert torch.equal(one_lse[:, first:last], lse[:, rows])
                first = last


MIXED = [*SEQUENCES, (15, 2000), (300, 4000)]


@pytest.mark.gpu
@DTYPES
@SPLITS
@pytest.mark.parametrize("options", [{}, {"window_size": (333, 0)}], ids=str)
@pytest.mark.parametrize("page_size", [16, 48])  # on Hopper of 48 by the code for 8.0
def test_fixed_splits_give_the_bits_of_each_kind_alone(dtype, splits, options, page_size):
    case = random_case("cuda", dtype, MIXED, (8, 2), 128, page_size)
    assert_each_kind_alone_gives_its_bits(case, **splits, **options)


@pytest.mark.gpu
@SPLITS
@pytest.mark.parametrize("kernel", [pytest.param("decode", marks=pytest.mark.sm80), "decode_sm75"])
def test_so_do_the_kernels_for_few_queries_by_name(splits, kernel):
    case = random_case("cuda", torch.float16, MIXED, (8, 2), 128)
    assert_each_kind_alone_gives_its_bits(case, **splits, backend=kernel)
    assert_right(case, **splits, backend=kernel)


@pytest.mark.gpu
@pytest.mark.sm80
@SPLITS
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8], ids=lambda d: str(d)[6:])
def test_and_caches_of_8_bits(stored, splits):
    case, scales = eight_bit(random_case("cuda", torch.bfloat16, MIXED, (8, 2), 128), stored)
    assert_each_kind_alone_gives_its_bits(case, **splits, **scales)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("splits", [{}, {"split_size": 128}], ids=str)
def test_a_graph_replays_with_other_kinds(dtype, splits):
    """Which sequences decode is known when the kernels run."""
    pages = random_case("cuda", dtype, [(1, 3000)] * 5, (8, 2), 128)
    q = torch.randn(310, 8, 128, device="cuda").to(dtype)

    def tensors(counts, keys):
        starts = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
        lengths = torch.tensor(keys, dtype=torch.int32, device="cuda")
        return (q, *pages.tensors()[1:4], lengths, starts)

    def run(q, k_cache, v_cache, table, lengths, starts):
        out, lse = paged_attention(
            q, k_cache, v_cache, table, lengths, starts, max_seqlen_q=300, **splits
        )
        is_written = torch.arange(len(q), device="cuda") < starts[-1]
        return out.where(is_written[:, None, None], 0), lse.where(is_written, 0)

    states = [
        tensors([1, 300, 1, 2, 6], [3000, 2000, 1, 2999, 64]),
        tensors([300, 1, 0, 1, 1], [300, 1234, 9, 1, 2048]),
        tensors([100, 70, 60, 50, 30], [3000, 100, 1000, 50, 2000]),
        tensors([1, 1, 1, 0, 1], [3000, 100, 1000, 50, 2000]),
    ]
    for first, second in zip(states, states[1:] + states[:1], strict=True):
        assert_replays(run, first, second)
