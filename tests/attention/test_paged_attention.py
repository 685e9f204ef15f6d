"""paged_attention: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from paged_cases import assert_right, random_case, sdpa

from llamatelemetry.ops import paged_attention
from llamatelemetry.ops.backends import flash_why_not

LENGTHS = (1, 3, 113, 239, 1023)
MASKS = [
    {"causal": False},
    {"window_size": (20, -1)},
    {"window_size": (0, 0)},
    {"causal": False, "window_size": (7, 30)},
    {"causal": False, "window_size": (-1, 0)},
    {"softcap": 3.0},
    {"softcap": 30.0, "window_size": (64, 0), "softmax_scale": 0.3},
]


@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (4, 1), (9, 1)], ids=str)
def test_decode(device, dtype, heads, page_size):
    assert_right(random_case(device, dtype, [(1, n) for n in LENGTHS], heads, 64, page_size))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("queries", [1, 4, 60, 193])
@pytest.mark.parametrize("page_size", [7, 16])
def test_masks(device, dtype, page_size, queries, mask):
    sequences = [(queries, n) for n in (queries, queries + 64, queries + 140)]
    assert_right(random_case(device, dtype, sequences, page_size=page_size), **mask)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 96, 128, 136, 256])
def test_head_dims(device, dtype, head_dim):
    for queries in (1, 70):
        sequences = [(queries, 70), (queries, 200)]
        assert_right(random_case(device, dtype, sequences, (4, 2), head_dim))


def test_one_long_sequence(device):
    assert_right(random_case(device, torch.bfloat16, [(1023, 1023)], (3, 1)))
    assert_right(random_case(device, torch.float32, [(5, 4000)], (9, 3)))
    assert_right(random_case(device, torch.float32, [(130, 3000)], (9, 3)))


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("page_size", [7, 16, 128])
def test_each_backend(backend, page_size, queries):
    dtype = torch.float16
    if reason := flash_why_not(backend, dtype, page_size=page_size):
        pytest.skip(f"{backend}: {reason}")
    device = torch.device("cpu" if backend == "cpu" else "cuda")
    sequences = [(queries, 150), (queries - 1, 300), (1, 70)]
    assert_right(random_case(device, dtype, sequences, page_size=page_size), backend=backend)


@pytest.mark.parametrize("heads", [(40, 1), (128, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("queries", [1, 2, 16, 17])
def test_wide_groups_and_few_queries(device, heads, queries):
    assert_right(random_case(device, torch.float32, [(queries, 150), (queries - 1, 30)], heads, 16))


@pytest.mark.parametrize("page_size", [4, 8])
@pytest.mark.parametrize("queries", [1, 40])
def test_empty_sequences_and_rows_without_keys(device, dtype, queries, page_size):
    sequences = [(0, 0), (queries, 0), (queries, 5), (0, 9), (queries, 50), (0, 0)]
    case = random_case(device, dtype, sequences, page_size=page_size)
    out, lse = assert_right(case)
    assert (out[:queries] == 0).all()
    assert (lse[:, :queries] == -torch.inf).all()
    if queries > 5:  # the first queries of a chunk longer than its keys see none
        assert (out[queries : 2 * queries - 5] == 0).all()


def test_no_tokens_and_no_sequences(device, dtype):
    for sequences in ([(0, 5), (0, 0)], []):
        out, lse = random_case(device, dtype, sequences).run()
        assert out.shape == (0, 6, 64)
        assert lse.shape == (6, 0)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 32),
    st.integers(1, 20),
    st.booleans(),
    st.tuples(st.integers(-1, 50), st.integers(-1, 50)),
    st.sampled_from([0.0, 5.0]),
)
def test_any_case(sequences, group, heads_kv, eighths, page_size, causal, window_size, softcap):
    torch.manual_seed(0)
    heads = (group * heads_kv, heads_kv)
    case = random_case("cpu", torch.float32, sequences, heads, 8 * eighths, page_size)
    assert_right(case, causal=causal, window_size=window_size, softcap=softcap)


@pytest.mark.parametrize("queries", [1, 33])
def test_a_sequence_does_not_depend_on_its_neighbours(device, dtype, queries):
    case = random_case(device, dtype, [(queries, n) for n in (300, 40, 700)], (9, 3))
    # "decode" cuts keys where the lengths of the whole batch say.
    options = {"backend": "simt"} if device.type == "cuda" and queries < 16 else {}
    out, lse = case.run(**options)
    for b in range(3):
        rows = slice(b * queries, (b + 1) * queries)
        alone = replace(
            case,
            q=case.q[rows],
            block_table=case.block_table[b : b + 1],
            cache_seqlens=case.cache_seqlens[b : b + 1],
            cu_seqlens_q=case.cu_seqlens_q[:2],
        )
        alone_out, alone_lse = alone.run(**options)
        assert torch.equal(alone_out, out[rows])
        assert torch.equal(alone_lse, lse[:, rows])


@pytest.mark.parametrize(("page_size", "gap"), [(5, 1), (8, 8)])
def test_any_strides_and_offsets(device, dtype, page_size, gap):
    # One layer of a cache that holds all layers, K beside V; heads before slots; a sliced table.
    case = random_case(device, dtype, [(1, 40), (37, 61)], (6, 2), 40, page_size=page_size)
    out, lse = case.run()
    shape = case.k_cache.shape
    every = torch.full((shape[0], 3, 2, shape[2], shape[1], shape[3] + gap), torch.nan, dtype=dtype)
    k_cache, v_cache = every.to(device)[:, 1, :, :, :, gap:].unbind(1)
    k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    k_cache.copy_(case.k_cache)
    v_cache.copy_(case.v_cache)
    q = torch.full((6, 38, 40 + gap), torch.nan, dtype=dtype, device=device)[:, :, gap:].transpose(
        0, 1
    )
    q.copy_(case.q)
    table = case.block_table.repeat_interleave(2, 0)[::2]
    moved = replace(case, q=q, k_cache=k_cache, v_cache=v_cache, block_table=table)
    moved_out, moved_lse = moved.run()
    assert torch.equal(moved_out, out)
    assert torch.equal(moved_lse, lse)


@pytest.mark.parametrize("queries", [1, 40])
def test_no_pages(device, dtype, queries):
    case = random_case(device, dtype, [(queries, 0)])
    out, lse = replace(case, block_table=case.block_table[:, :0]).run()
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("starts", [[0, 3, 5], [-1, 3, 4], [0, 4, 3], [0, 3, 90000]], ids=str)
def test_starts_past_the_queries_on_the_cpu(starts):
    case = random_case(torch.device("cpu"), torch.float32, [(3, 5), (1, 7)])
    wrong = replace(case, cu_seqlens_q=torch.tensor(starts, dtype=torch.int32))
    assert_refuses(wrong.run, "cu_seqlens_q must rise from 0 to at most 4, the tokens of q, got")


def test_refusals(device):
    case = random_case(device, torch.float32, [(3, 5), (1, 7)])

    def refuses(*parts, options=None, **changed):
        assert_refuses(
            lambda: replace(case, **changed).run(**(options or {})), "paged_attention: ", *parts
        )

    refuses("q must be [total_q, num_heads_q, head_dim], got shape [6, 64]", q=case.q[0])
    refuses("q must be float32, float16 or bfloat16, got float64", q=case.q.double())
    refuses("q must have a contiguous last dimension", q=case.q.repeat(1, 1, 2)[..., ::2])
    refuses("head_dim must be a multiple of 8 up to 256, got 60; pad", q=case.q[..., :60])
    refuses("head_dim must be", "got 264", q=torch.zeros(4, 6, 264, device=device))
    refuses("num_heads_q must be a multiple of num_heads_kv = 2, got 5", q=case.q[:, :5])
    refuses("k_cache must be [num_blocks, page_size, num_heads_kv", k_cache=case.k_cache[0])
    refuses("k_cache must be", "= [5, 16, 2, 32], got", q=case.q[..., :32])
    refuses("page_size must be at least 1, got 0", k_cache=case.k_cache[:, :0])
    refuses(
        "v_cache must be", "= [5, 16, 2, 64], got shape [4, 16, 2, 64]", v_cache=case.v_cache[1:]
    )
    half = case.k_cache.half(), case.v_cache.half()
    refuses(
        "k_cache must have the dtype of q (bfloat16), got float16",
        q=case.q.bfloat16(),
        k_cache=half[0],
        v_cache=half[1],
    )
    refuses(
        "v_cache must have a contiguous last", v_cache=case.v_cache.repeat(1, 1, 1, 2)[..., ::2]
    )
    refuses("block_table must be [batch, max_blocks], got", block_table=case.block_table[0])
    refuses("block_table must be int32, got int64", block_table=case.block_table.long())
    refuses("cache_seqlens must be [batch] = [2], got", cache_seqlens=case.cache_seqlens[1:])
    refuses("cache_seqlens must be int32, got int64", cache_seqlens=case.cache_seqlens.long())
    refuses("cu_seqlens_q must be [batch + 1] = [3], got", cu_seqlens_q=case.cu_seqlens_q[1:])
    refuses("max_seqlen_q must be at least 0, got -1", max_seqlen_q=-1)
    refuses("window_left must be at least -1, got -2", options={"window_size": (-2, 0)})
    refuses("window_right must be at least -1, got -3", options={"window_size": (0, -3)})
    refuses("softcap must lie in [0, 10000] (0: off)", options={"softcap": -1.0})
    refuses("softmax_scale must be finite", "inf", options={"softmax_scale": torch.inf})
    refuses(
        "backend must be None or one of cpu, decode, decode_sm75, sm75",
        options={"backend": "flash"},
    )
    other = "simt" if device.type == "cpu" else "cpu"
    refuses(f"backend must serve the call, got {other}: the tensors", options={"backend": other})
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.ones(4, 6, 64, device=device, requires_grad=True)
        refuses("q must not require grad", q=grad)


@pytest.mark.parametrize("sequences", [[(1, 5), (1, 40)], [(20, 20), (3, 50)], [(0, 0)]], ids=str)
def test_opcheck(device, dtype, sequences):
    case = random_case(device, dtype, sequences)
    if not len(case.q):  # opcheck cannot clone an empty slice
        case = replace(case, q=case.q.new_empty(case.q.shape))
    run_opcheck(
        "paged_attention", *case.tensors(), case.max_seqlen_q, 0.125, True, -1, -1, 0.0, None
    )


@pytest.mark.parametrize("queries", [1, 64])
def test_is_torch_attention(device, dtype, queries):
    case = random_case(device, dtype, [(queries, 64)], (4, 4))
    out, _ = case.run()
    torch.testing.assert_close(out, sdpa(case), atol=2e-2, rtol=2e-2)


def test_replay_with_other_lengths(device, dtype):
    """Recorded while sequences are short; replayed when they have grown, shrunk and emptied."""
    case = random_case(device, dtype, [(1, 700), (1, 5), (1, 130), (1, 64)], (9, 3))

    def run(q, k_cache, v_cache, table, seqlens, starts):
        return paged_attention(q, k_cache, v_cache, table, seqlens, starts, max_seqlen_q=1)

    for lengths in ([3, 1, 60, 64], [0, 5, 1, 2]):
        first = torch.tensor(lengths, dtype=torch.int32, device=device)
        assert_replays(run, replace(case, cache_seqlens=first).tensors(), case.tensors())
        assert_replays(run, case.tensors(), replace(case, cache_seqlens=first).tensors())


def test_replay_with_other_chunks(device, dtype):
    case = random_case(device, dtype, [(60, 300), (10, 40), (0, 5)], (9, 3))
    starts = torch.tensor([0, 5, 5, 70], dtype=torch.int32, device=device)
    seqlens = torch.tensor([7, 0, 5], dtype=torch.int32, device=device)

    def run(q, k_cache, v_cache, table, seqlens, starts):
        return paged_attention(q, k_cache, v_cache, table, seqlens, starts, max_seqlen_q=70)

    other = replace(case, cache_seqlens=seqlens, cu_seqlens_q=starts)
    assert_replays(run, other.tensors(), case.tensors())
    assert_replays(run, case.tensors(), other.tensors())


def test_compile(device):
    def run(q, k_cache, v_cache, table, seqlens, starts):
        return paged_attention(q, k_cache, v_cache, table, seqlens, starts, max_seqlen_q=1)

    inputs = [random_case(device, torch.float32, [(1, 9)] * n).tensors() for n in (4, 5, 9)]
    assert_compiles(run, inputs)
