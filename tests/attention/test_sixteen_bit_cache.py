"""Caches of float16 and bfloat16 beside float32, which the CPU converts as it reads and writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from paged_cases import assert_right, random_case

from llamatelemetry.ops import append_kv_, paged_attention, reference

CPU = torch.device("cpu")
STORED = pytest.mark.parametrize(
    "stored", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)


def beside_float32(stored, *args, device=CPU):
    """random_case of float32 with its caches rounded; NaN stays where it is."""
    case = random_case(device, torch.float32, *args)
    return replace(case, k_cache=case.k_cache.to(stored), v_cache=case.v_cache.to(stored))


def widened(case):
    return replace(case, k_cache=case.k_cache.float(), v_cache=case.v_cache.float())


def assert_is_float32_s(case, **options):
    """What is stored is exact in float32, and so is all that is computed with it: the bits are
    those of a float32 cache of the same numbers, which are within twice torch's error."""
    wanted = assert_right(widened(case), **options)
    for ours, same in zip(case.run(**options), wanted, strict=True):
        assert torch.equal(ours, same)


@STORED
@pytest.mark.parametrize("queries", [1, 4, 17, 70, 193])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": (100, 0)},
        {"softcap": 5.0, "causal": False},
        {"split_size": 64},
        {"num_splits": 3, "softmax_scale": 0.3},
    ],
    ids=str,
)
def test_attention(stored, queries, options):
    sequences = [(queries, n) for n in (queries, queries + 64, queries + 1140)]
    assert_is_float32_s(beside_float32(stored, sequences), **options)


@STORED
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads"),
    [
        (8, 1, (4, 4)),
        (24, 16, (4, 2)),
        (64, 100, (9, 3)),
        (72, 7, (12, 2)),
        (136, 16, (8, 1)),
        (256, 64, (20, 1)),
    ],
)
def test_widths_and_pages(stored, queries, head_dim, page_size, heads):
    sequences = [(queries, 400), (0, 9), (queries, 40), (queries, 0)]
    case = beside_float32(stored, sequences, heads, head_dim, page_size)
    terms = torch.randn(2, heads[0])
    assert_is_float32_s(case, sinks=terms[0], alibi_slopes=terms[1].abs() / 10)


@STORED
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 32),
    st.integers(1, 20),
    st.booleans(),
)
def test_any_case(stored, sequences, group, heads_kv, eighths, page_size, causal):
    torch.manual_seed(0)
    heads = (group * heads_kv, heads_kv)
    case = beside_float32(stored, sequences, heads, 8 * eighths, page_size)
    assert_is_float32_s(case, causal=causal)


@STORED
@pytest.mark.parametrize("queries", [1, 40])
def test_any_strides(stored, queries):
    case = beside_float32(stored, [(queries, 40), (queries, 61)], (6, 2), 40, 5)
    shape = case.k_cache.shape
    every = torch.full((shape[0], 3, 2, shape[2], shape[1], shape[3] + 1), torch.nan, dtype=stored)
    k_cache, v_cache = (x.transpose(1, 2) for x in every[:, 1, :, :, :, 1:].unbind(1))
    k_cache.copy_(case.k_cache)
    v_cache.copy_(case.v_cache)
    assert_is_float32_s(replace(case, k_cache=k_cache, v_cache=v_cache))


@STORED
def test_every_number(stored):
    """All 65536 of them as values, 16 a row that sees them alone."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(-1, 1, 1, 16)
    v_cache, count = numbers.view(stored), len(numbers)
    k_cache = torch.zeros_like(v_cache)
    where = (
        torch.arange(count, dtype=torch.int32)[:, None],
        torch.ones(count, dtype=torch.int32),
        torch.arange(count + 1, dtype=torch.int32),
    )
    q = torch.zeros(count, 1, 16)
    out, _ = paged_attention(q, k_cache, v_cache, *where, max_seqlen_q=1)
    assert torch.equal(out.nan_to_num(7.0), v_cache.float()[:, 0].nan_to_num(7.0))


@STORED
def test_reference(stored):
    case = beside_float32(stored, [(1, 40), (20, 50)])
    for ours, same in zip(
        reference.paged_attention(*case.tensors()),
        reference.paged_attention(*widened(case).tensors()),
        strict=True,
    ):
        assert torch.equal(ours, same)


def tokens_of(stored, k, v, num_blocks=5, page_size=4):
    """What append_kv_ takes: k, v, poisoned caches, slots of which one is -1."""
    caches = torch.full((2, num_blocks, page_size, *k.shape[1:]), torch.nan, dtype=stored)
    slots = torch.randperm(num_blocks * page_size)[: len(k)]
    slots[1:2] = -1
    return k, v, *caches, slots


@STORED
@pytest.mark.parametrize("head_dim", [1, 6, 64, 100, 264])
def test_append(stored, head_dim):
    qkv = torch.randn(9, 3, 3, head_dim) * 10.0 ** torch.randint(-9, 9, (9, 3, 3, 1))
    qkv[0, 1, 0, 0], qkv[2, 2, 1, 0], qkv[3, 1, 2, 0] = torch.nan, torch.inf, -torch.inf
    args = tokens_of(stored, qkv[:, 1], qkv[:, 2])
    expected = [x.clone() for x in args]
    reference.append_kv_(*expected)
    append_kv_(*args)
    for ours, wanted in zip(args, expected, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), wanted.nan_to_num(7.0))


@STORED
def test_rounding_of_every_number_and_every_tie(stored):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(stored).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    near = [x.view(torch.int32) + d for x in (numbers, ties) for d in (-1, 0, 1)]
    x = torch.cat(near).view(torch.float32)
    x = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 1, 64)
    blank = torch.zeros(2, len(x), 1, 1, 64, dtype=stored)
    append_kv_(x, x, *blank, torch.arange(len(x)))
    assert torch.equal(blank[0].flatten().nan_to_num(7.0), x.to(stored).flatten().nan_to_num(7.0))
    if stored == torch.float16:
        edge = torch.tensor([65519.9, 65520.0, -65520.0]).view(3, 1, 1)
        args = tokens_of(stored, edge, edge)
        append_kv_(*args[:4], torch.arange(3))
        assert args[2].flatten()[:3].tolist() == [65504.0, torch.inf, -torch.inf]


def test_refusals():
    case = beside_float32(torch.float16, [(3, 5), (1, 7)])

    def refuses(*parts, options=None, **changed):
        assert_refuses(
            lambda: replace(case, **changed).run(**(options or {})), "paged_attention: ", *parts
        )

    half, brain = case.q.half(), case.q.bfloat16()
    refuses("k_cache must have the dtype of q (bfloat16), got float16", q=brain)
    wide = {"k_cache": case.k_cache.float(), "v_cache": case.v_cache.float()}
    refuses("k_cache must have the dtype of q (float16), got float32", q=half, **wide)
    wide = {"k_cache": case.k_cache.double(), "v_cache": case.v_cache.double()}
    refuses("have the dtype of q (float32), float16 or bfloat16, got float64", **wide)
    other = case.v_cache.bfloat16()
    refuses("v_cache must have the dtype of k_cache (float16), got bfloat16", v_cache=other)
    scales = {"k_scales": torch.ones(1), "v_scales": torch.ones(1)}
    refuses("k_scales must be None but beside caches of float8_e4m3fn or int8", options=scales)
    k, v, *caches = tokens_of(torch.float16, *torch.randn(2, 9, 3, 16))

    def append_refuses(*parts, k=k, v=v):
        assert_refuses(lambda: append_kv_(k, v, *caches), "append_kv_: ", *parts)

    takes = "k must have the dtype of k_cache (float16) or float32, got"
    append_refuses(f"{takes} bfloat16", k=k.bfloat16())
    append_refuses("v must have the dtype of k (float32), got float16", v=v.half())
    append_refuses(f"{takes} float64", k=k.double())


@pytest.mark.gpu
def test_a_gpu_converts_no_16_bits():
    cuda = torch.device("cuda")
    case = beside_float32(torch.float16, [(1, 5)], device=cuda)
    assert_refuses(case.run, "k_cache must have the dtype of q (float32), got float16")
    args = [x.to(cuda) for x in tokens_of(torch.float16, *torch.randn(2, 9, 3, 16))]
    assert_refuses(lambda: append_kv_(*args), "k must have the dtype of k_cache (float16), got")


@STORED
def test_opcheck(stored):
    args = tokens_of(stored, *torch.randn(2, 9, 3, 16))
    run_opcheck("append_kv_", *(x.nan_to_num(0.0) for x in args))
    case = beside_float32(stored, [(1, 5), (1, 40)])
    run_opcheck("paged_attention", *case.tensors(), 1, 0.125, True, -1, -1, 0.0)


def attend(*tensors):
    return paged_attention(*tensors, max_seqlen_q=1)


@STORED
def test_replay(stored):
    case = beside_float32(stored, [(1, 300), (1, 7)])
    shorter = torch.tensor([20, 3], dtype=torch.int32)
    other = (*case.tensors()[:4], shorter, case.cu_seqlens_q)
    assert_replays(attend, case.tensors(), other)
    assert_replays(attend, other, case.tensors())
    first, second = (tokens_of(stored, *torch.randn(2, 9, 3, 16)) for _ in range(2))
    assert_replays(append_kv_, first, second)


@STORED
def test_compile(stored):
    cases = [beside_float32(stored, [(1, 9)] * count) for count in (4, 5, 9)]
    assert_compiles(attend, [case.tensors() for case in cases])
    rows = [torch.randn(2, n, 3, 16) for n in (2, 5, 9)]
    assert_compiles(append_kv_, [tokens_of(stored, *x) for x in rows])
