"""The kernel for few queries on GPUs: how it divides keys, and what it shares with the others."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import flash_cases
import pytest
import torch
from flash_cases import with_tensors
from op_checks import assert_replays
from paged_cases import assert_right, random_case
from tolerance import assert_within_2x

from llamatelemetry.ops import flash_attn, reference

pytestmark = [pytest.mark.gpu]
# "decode_sm75" is the code for older GPUs, which any GPU runs.
KERNELS = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param("decode", torch.float16, marks=pytest.mark.sm80),
        pytest.param("decode", torch.bfloat16, marks=pytest.mark.sm80),
        pytest.param("decode_sm75", torch.float16),
    ],
    ids=lambda x: x if isinstance(x, str) else str(x)[6:],
)
LENGTHS = [
    [70_000],
    [33_000, *[128] * 15],
    [1, 0, 63, 64, 65, 4095, 4096, 4097],
    [(17 * i) % 300 for i in range(300)],
    # Cut by segments: a wave of blocks, two, and as many segments as there are blocks.
    [700, 0, 1500],
    [4096] * 8,
    [1000] * 32,
]


@KERNELS
@pytest.mark.parametrize(
    ("heads", "lengths"),
    [
        *product([(8, 2)], LENGTHS),
        *product([(32, 8)], LENGTHS[4:]),
        *product([(3, 3)], LENGTHS[:3]),
        *product([(71, 1)], [[9000], LENGTHS[2]]),  # each head's keys once more in the reference
    ],
    ids=lambda x: str(x) if isinstance(x, tuple) else f"{len(x)} rows",
)
def test_lengths(kernel, dtype, heads, lengths):
    case = random_case("cuda", dtype, [(1, n) for n in lengths], heads, 128, page_size=16)
    assert_right(case, backend=kernel)


@KERNELS
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_widths_and_pages(kernel, dtype, head_dim, page_size):
    sequences = [(1, 900), (5, 1700), (15, 2500), (2, 1)]
    case = random_case("cuda", dtype, sequences, (12, 2), head_dim, page_size)
    assert_right(case, backend=kernel)


@KERNELS
@pytest.mark.parametrize("head_dim", [40, 96, 128])
@pytest.mark.parametrize(
    "options", [{}, {"window_size": (100, 0)}, {"softcap": 20.0, "causal": False}], ids=str
)
def test_rows_of_several_warps(kernel, dtype, head_dim, options):
    """Drafts to verify beside single queries and chunks: up to 64 rows over one read of keys."""
    sequences = [(16, 3000), (1, 900), (5, 5), (0, 70), (33, 2000), (9, 20_000)]
    sequences += [(2, 40)] * 60  # as many as it takes for rows to share warps
    case = random_case("cuda", dtype, sequences, (8, 2), head_dim, page_size=16)
    assert_right(case, backend=kernel, **options)
    again = case.run(backend=kernel, **options), case.run(backend=kernel, **options)
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


# What 64 rows by wgmma come to beside their default, and what mma.sync keeps.
DRAFT_OPTIONS = [
    {},
    {"softmax_scale": -0.05},
    {"sinks": True},
    {"causal": False},
    {"causal": False, "window_size": (300, 5)},
    {"window_size": (333, 0)},
    {"softcap": 30.0, "sinks": True, "alibi_slopes": True},
]


@KERNELS
@pytest.mark.parametrize("page_size", [1, 64, 256])
@pytest.mark.parametrize("options", DRAFT_OPTIONS, ids=str)
def test_drafts_of_many_sequences(kernel, dtype, page_size, options):
    """Of 64 rows each, and parts of them that are combined, with what few calls ask for."""
    sequences = [(16 - i % 3, 40 + 400 * i) for i in range(9)] + [(1, 7)] * 8
    case = random_case("cuda", dtype, sequences, (32, 8), 128, page_size)
    options = with_tensors(options, 32, "cuda")
    first = assert_right(case, backend=kernel, **options)
    for _ in range(5):
        again = case.run(backend=kernel, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@KERNELS
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("options", DRAFT_OPTIONS, ids=str)
def test_drafts_over_dense_keys(kernel, dtype, head_dim, options):
    options = with_tensors(options, 32, "cuda")
    q, k, v = flash_cases.random_qkv("cuda", dtype, 9, (16, 777), (32, 8), head_dim)
    flash_cases.assert_right(q, k, v, kernel, **options)
    packed = flash_cases.random_varlen("cuda", dtype, [(16, 777)] * 9, (32, 8), head_dim, tail=0)
    packed = *(x.flatten(0, 1) for x in (q, k, v)), *packed[3:]
    out, lse = flash_cases.run_varlen(*packed, backend=kernel, **options)
    in_32, in_64 = (
        reference.flash_attn_varlen(*(x.to(d) for x in packed[:3]), *packed[3:], **options)
        for d in (torch.float32, torch.float64)
    )
    assert_within_2x(out, in_32[0].to(dtype), in_64[0])
    flash_cases.assert_lse(lse, in_32[1], in_64[1], dtype)


@KERNELS
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("splits", [{}, {"split_size": 128}], ids=str)
def test_chunks(kernel, dtype, head_dim, splits):
    """By name, and by default where nothing else with tensor cores serves pages."""
    sequences = [(128, 1000), (300, 300), (1, 1500), (300, 1700), (16, 40)]
    case = random_case("cuda", dtype, sequences, (8, 2), head_dim)
    assert_right(case, backend=kernel, **splits)
    assert_right(case, backend=kernel, window_size=(200, 0), **splits)


@KERNELS
@pytest.mark.parametrize("window", [(0, 0), (20, 0), (700, 0)], ids=str)
def test_what_a_window_hides_is_not_read(kernel, dtype, window):
    case = random_case("cuda", dtype, [(1, 1500), (1, 40), (1, 801)], (8, 2), 64, page_size=1)
    expected = assert_right(case, backend=kernel, window_size=window)
    for b, length in enumerate(case.cache_seqlens.tolist()):
        hidden = case.block_table[b, : max(length - 1 - window[0], 0)]
        case.k_cache[hidden] = torch.nan
        case.v_cache[hidden] = torch.nan
    for ours, theirs in zip(case.run(backend=kernel, window_size=window), expected, strict=True):
        assert torch.equal(ours, theirs)


@KERNELS
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("seqlens", [(1, 3000), (3, 200), (7, 7)], ids=str)
def test_dense_keys_with_sinks_and_alibi(kernel, dtype, seqlens, softcap):
    q, k, v = (
        torch.randn(2, n, h, 64, device="cuda", dtype=dtype)
        for n, h in zip((seqlens[0], seqlens[1], seqlens[1]), (6, 2, 2), strict=True)
    )
    options = {
        "causal": True,
        "softcap": softcap,
        "sinks": torch.randn(6, device="cuda"),
        "alibi_slopes": torch.rand(2, 6, device="cuda"),
    }
    ours = flash_attn(q, k, v, backend=kernel, **options)
    in_32, in_64 = (
        reference.flash_attn(q.to(d), k.to(d), v.to(d), **options)
        for d in (torch.float32, torch.float64)
    )
    assert_within_2x(ours[0], in_32[0].to(dtype), in_64[0])
    assert_within_2x(ours[1], in_32[1], in_64[1])


@KERNELS
def test_it_gives_the_same_bits_each_time(kernel, dtype):
    case = random_case("cuda", dtype, [(1, n) for n in (9000, 10, 700)], (8, 2), 128)
    first = case.run(backend=kernel)
    for _ in range(20):
        again = case.run(backend=kernel)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@KERNELS
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("splits", [{"num_splits": 3}, {"split_size": 128}], ids=str)
def test_fixed_splits(kernel, dtype, head_dim, splits):
    sequences = [(2, 900), (1, 130), (0, 70), (4, 2), (1, 0)]
    case = random_case("cuda", dtype, sequences, (12, 2), head_dim)
    assert_right(case, backend=kernel, **splits)
    assert_right(case, backend=kernel, sinks=torch.randn(12, device="cuda"), **splits)


@KERNELS
def test_fixed_splits_have_room_for_more_queries_than_were_said(kernel, dtype):
    case = random_case("cuda", dtype, [(10, 1024 - i) for i in range(4)], (32, 8), 128)
    understated = replace(case, max_seqlen_q=2)
    first, second = (x.run(backend=kernel, split_size=64) for x in (case, understated))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", [pytest.param("decode", marks=pytest.mark.sm80), "decode_sm75"])
@pytest.mark.parametrize("heads", [(6, 2), (144, 36)], ids=["16 rows", "64 rows"])
def test_a_graph_replays_with_other_lengths(kernel, heads):
    queries = 1 if heads[1] == 2 else 16

    def case_of(lengths):
        sequences = [(queries, n) for n in lengths]
        return random_case("cuda", torch.float16, sequences, heads, max_blocks=300)

    case, other = case_of((4000, 30, 200, 0)), case_of((5, 4700, 64, 1000))
    num_pages = max(len(case.k_cache), len(other.k_cache))

    def tensors(case):
        pads = [
            torch.nn.functional.pad(c, (0, 0, 0, 0, 0, 0, 0, num_pages - len(c)))
            for c in (case.k_cache, case.v_cache)
        ]
        return case.q, *pads, case.block_table, case.cache_seqlens

    def run(q, k_cache, v_cache, table, lengths):
        return torch.ops.llamatelemetry.paged_attention.default(
            *(q, k_cache, v_cache, table, lengths, case.cu_seqlens_q),
            *(queries, 0.125, True, -1, -1, 0.0, kernel),
        )

    assert_replays(run, tensors(case), tensors(other))
