"""paged_attention's sinks, ALiBi and fixed splits, on every implementation that serves pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_refuses, assert_replays, run_opcheck
from paged_cases import Case, assert_right, random_case

from llamatelemetry.ops import paged_attention
from llamatelemetry.ops.backends import flash_why_not

TERMS = ["sinks", "alibi", "slopes of each sequence", "both", "both and softcap"]
SPLITS = [{"num_splits": 1}, {"num_splits": 3}, {"split_size": 64}, {"split_size": 256}]


def score_terms(name, batch, heads, device):
    terms = {}
    if "sinks" in name or "both" in name:
        terms["sinks"] = torch.randn(heads, device=device) * 2
    if name in ("alibi", "both", "both and softcap"):
        terms["alibi_slopes"] = torch.rand(heads, device=device) / 4
    if name == "slopes of each sequence":
        terms["alibi_slopes"] = torch.rand(batch, heads, device=device) / 4
    if "softcap" in name:
        terms["softcap"] = 5.0
    return terms


def served(backend, dtype, page_size=16):
    """Where the backend runs; skips what it says it does not serve."""
    if reason := flash_why_not(backend, dtype, page_size=page_size):
        pytest.skip(f"{backend}: {reason}")
    return torch.device("cpu" if backend == "cpu" else "cuda")


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("queries", [1, 4, 40])
def test_score_terms(device, dtype, queries, name):
    sequences = [(queries, n) for n in (queries, queries + 64, queries + 700)]
    case = random_case(device, dtype, sequences)
    assert_right(case, **score_terms(name, 3, 6, device))


@pytest.mark.parametrize("name", TERMS)
def test_score_terms_of_each_backend(backend, name):
    device = served(backend, torch.float16)
    sequences = [(40, 150), (3, 300), (0, 70), (1, 0)]
    case = random_case(device, torch.float16, sequences, head_dim=128)
    terms = score_terms(name, 4, 6, device)
    assert_right(case, backend=backend, window_size=(60, -1), **terms)


def test_a_sink_alone(device, dtype):
    case = random_case(device, dtype, [(1, 0), (1, 5)])
    sinks = torch.randn(6, device=device)
    out, lse = case.run(sinks=sinks, num_splits=2)
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[:, 0], sinks)


def test_a_sink_that_is_no_number_shows_in_its_head_alone(backend):
    device = served(backend, torch.float16)
    case = random_case(device, torch.float16, [(3, 200), (20, 30)], (4, 2))
    sinks = torch.randn(4, device=device)
    clean = case.run(sinks=sinks, backend=backend)
    sinks[2] = torch.nan
    out, lse = case.run(sinks=sinks, backend=backend)
    assert out[:, 2].isnan().all()
    assert lse[2].isnan().all()
    others = torch.tensor([0, 1, 3], device=device)
    assert torch.equal(out[:, others], clean[0][:, others])
    assert torch.equal(lse[others], clean[1][others])


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("queries", [1, 5, 16])
@pytest.mark.parametrize("options", [{}, {"window_size": (100, 0)}, {"softcap": 5.0}], ids=str)
def test_fixed_splits(device, dtype, queries, splits, options):
    sequences = [(queries, n) for n in (0, queries, 63, 64, 65, 1000, 1700)]
    terms = score_terms("both", 7, 6, device)
    assert_right(random_case(device, dtype, sequences), **options, **splits)
    assert_right(random_case(device, dtype, sequences), **options, **splits, **terms)


@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 192, 256])
def test_fixed_splits_of_any_width(device, dtype, head_dim):
    case = random_case(device, dtype, [(2, 900), (1, 130)], (12, 2), head_dim)
    assert_right(case, split_size=128)


def test_more_parts_than_are_gathered_at_once(device):
    case = random_case(device, torch.float16, [(1, 70 * 64), (1, 33 * 64 + 1)], (3, 1), 128)
    assert_right(case, split_size=64)
    assert_right(case, num_splits=1000)


def rows_of(case: Case, b: int, pad: int) -> Case:
    """Sequence b by itself, its table `pad` entries wider; max_seqlen_q, which chooses the kernel,
    stays."""
    starts = case.cu_seqlens_q.tolist()
    table = case.block_table[b : b + 1]
    lengths = [0, starts[b + 1] - starts[b]]
    return replace(
        case,
        q=case.q[starts[b] : starts[b + 1]],
        block_table=torch.nn.functional.pad(table, (0, pad), value=-9),
        cache_seqlens=case.cache_seqlens[b : b + 1],
        cu_seqlens_q=torch.tensor(lengths, dtype=torch.int32, device=table.device),
    )


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("most", [1, 7])
@pytest.mark.parametrize("window", [(-1, -1), (333, 0)], ids=str)
def test_fixed_splits_give_the_same_bits_in_any_batch(device, dtype, splits, most, window):
    lengths = [1, 64, 65, 128, 700, 1023, 3000, *(37 * i % 500 + 7 for i in range(30))]
    sequences = [(min(1 + i % most, n), n) for i, n in enumerate(lengths)]
    case = random_case(device, dtype, sequences, (8, 2), page_size=32)
    options = {"window_size": window, **splits}
    out, lse = case.run(**options)
    for b in (0, 1, 2, 5, 6, 20, 36):
        rows = slice(*case.cu_seqlens_q[b : b + 2].tolist())
        for pad in (0, 50):
            alone_out, alone_lse = rows_of(case, b, pad).run(**options)
            assert torch.equal(alone_out, out[rows])
            assert torch.equal(alone_lse, lse[:, rows])


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 400)), min_size=1, max_size=4),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.integers(1, 20),
    st.tuples(st.integers(-1, 90), st.integers(-1, 9)),
    st.sampled_from([*SPLITS, {}]),
    st.sampled_from(["", *TERMS]),
)
def test_any_case(sequences, heads, page_size, window, splits, name):
    torch.manual_seed(0)
    group, heads_kv = heads
    case = random_case("cpu", torch.float32, sequences, (group * heads_kv, heads_kv), 32, page_size)
    terms = score_terms(name, len(sequences), group * heads_kv, "cpu")
    assert_right(case, causal=False, window_size=window, **splits, **terms)


def test_refusals(device):
    case = random_case(device, torch.float32, [(3, 5), (1, 7)])

    def refuses(*parts, **options):
        assert_refuses(lambda: case.run(**options), "paged_attention: ", *parts)

    refuses("sinks must be [num_heads_q] = [6], got", sinks=torch.zeros(5, device=device))
    refuses("sinks must be float32, got float64", sinks=torch.zeros(6, device=device).double())
    refuses("alibi_slopes must be [num_heads_q] = [6]", alibi_slopes=torch.zeros(5, device=device))
    slopes = torch.zeros(3, 6, device=device)
    refuses("alibi_slopes must be [batch, num_heads_q] = [2, 6]", alibi_slopes=slopes)
    refuses("num_splits must lie in [0, 65536]", "got -1", num_splits=-1)
    refuses("split_size must be a multiple of 64", "got 100", split_size=100)
    refuses("split_size must be a multiple of 64", "got -64", split_size=-64)
    refuses("num_splits must be 0 beside a split_size, got 2", num_splits=2, split_size=64)
    with torch.inference_mode(False), torch.enable_grad():
        refuses("sinks must not require grad", sinks=torch.zeros(6, requires_grad=True))


def test_opcheck(device, dtype):
    case = random_case(device, dtype, [(1, 5), (1, 140)])
    sinks, slopes = torch.randn(6, device=device), torch.rand(2, 6, device=device)
    run_opcheck(
        "paged_attention",
        *case.tensors(),
        case.max_seqlen_q,
        0.125,
        True,
        9,
        -1,
        0.0,
        None,
        sinks,
        slopes,
        0,
        64,
    )


def test_replay_with_other_lengths(device, dtype):
    case = random_case(device, dtype, [(1, 700), (1, 5), (1, 130), (1, 64)], (9, 3))
    sinks = torch.randn(9, device=device)

    def run(q, k_cache, v_cache, table, seqlens, starts):
        return paged_attention(
            q, k_cache, v_cache, table, seqlens, starts, max_seqlen_q=1, sinks=sinks, split_size=128
        )

    for lengths in ([3, 1, 60, 64], [0, 5, 1, 2]):
        first = torch.tensor(lengths, dtype=torch.int32, device=device)
        assert_replays(run, replace(case, cache_seqlens=first).tensors(), case.tensors())
        assert_replays(run, case.tensors(), replace(case, cache_seqlens=first).tensors())
