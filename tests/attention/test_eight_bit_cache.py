"""Caches of float8_e4m3fn and int8: what append writes, and attention over it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from paged_cases import eight_bit, random_case
from tolerance import assert_within_2x

from llamatelemetry.ops import append_kv_, copy_blocks_, paged_attention, reference, swap_blocks_
from llamatelemetry.ops.reference.cache import in_8_bits

STORED = pytest.mark.parametrize(
    "stored", [torch.float8_e4m3fn, torch.int8], ids=lambda d: str(d)[6:]
)


def bits(x):
    return x.view(torch.uint8)


def random_tokens(device, dtype, stored, head_dim=64, num_tokens=9, heads=3, page_size=4):
    """k, v (slices of one merged qkv), caches, slots of which one is -1, scales of NaN."""
    qkv = torch.randn(num_tokens, 3, heads, head_dim, device=device).to(dtype)
    qkv *= 10.0 ** torch.randint(-3, 3, (num_tokens, 3, heads, 1), device=device)
    shape = (2, 5, page_size, heads, head_dim)
    caches = torch.randint(0, 100, shape, dtype=torch.uint8, device=device).view(stored)
    scales = torch.full(shape[:-1], torch.nan, device=device)
    slots = torch.randperm(5 * page_size)[:num_tokens]
    slots[1:2] = -1
    return qkv[:, 1], qkv[:, 2], *caches, slots.to(device), *scales


def assert_appends(args):
    expected = [x.clone() for x in args]
    reference.append_kv_(*expected)
    append_kv_(*args)
    for ours, wanted in zip(args[5:], expected[5:], strict=True):
        assert torch.equal(ours.nan_to_num(7.0), wanted.nan_to_num(7.0))
    for ours, wanted, scales in zip(args[2:4], expected[2:4], expected[5:], strict=True):
        known = ~scales.isnan().expand(ours.shape[:-1])
        assert torch.equal(bits(ours)[known], bits(wanted)[known])


@STORED
@pytest.mark.parametrize("head_dim", [1, 100, 256])
def test_append(device, dtype, stored, head_dim):
    args = random_tokens(device, dtype, stored, head_dim)
    args[0][0, 0] = 0
    args[1][2, 1] = torch.nan
    args[0][3, 2, :1] = torch.inf
    args[1][4] *= 2.0**-120
    assert_appends(args)


@STORED
def test_append_with_one_scale_for_all(device, dtype, stored):
    args = random_tokens(device, dtype, stored)
    scales = torch.tensor([[0.37], [0.011]], device=device)  # the second too small for some
    assert_appends((*args[:5], *scales))


@STORED
def test_blocks_and_their_scales_are_copied_and_swapped(device, stored):
    _, _, k, v, _, *scales = random_tokens(device, torch.float32, stored, head_dim=33)
    pairs = torch.tensor([[0, 3], [4, 1], [-1, -1]], device=device)
    for caches in ((k, v), [x.normal_().unsqueeze(-1) for x in scales]):
        before = [x.clone() for x in caches]
        others = [torch.zeros_like(x) for x in caches]
        swap_blocks_(*caches, *others, pairs)
        copy_blocks_(*caches, pairs)
        for x, old, other in zip(caches, before, others, strict=True):
            assert torch.equal(bits(x)[[3, 1]], bits(old)[[0, 4]])
            assert torch.equal(bits(other)[[3, 1]], bits(old)[[0, 4]])


def multiplied_out(case, scales, dtype):
    k, v = (
        (x.double() * s.double().unsqueeze(-1)).to(dtype)
        for x, s in zip((case.k_cache, case.v_cache), scales.values(), strict=True)
    )
    return replace(case, q=case.q.to(dtype), k_cache=k, v_cache=v)


def assert_is_attention_of_what_is_stored(case, scales, options):
    """Within twice the error of paged_attention over the same numbers in q's dtype."""
    out, lse = case.run(**scales, **options)
    plain = {k: v for k, v in options.items() if k not in ("backend", "split_size", "num_splits")}
    in_64, lse_64 = multiplied_out(case, scales, torch.float64).reference(torch.float64, **plain)
    in_32, lse_32 = multiplied_out(case, scales, torch.float32).reference(torch.float32, **plain)
    same = in_32
    if case.q.dtype != torch.float32:
        same = multiplied_out(case, scales, case.q.dtype).run(**plain)[0]
    assert_within_2x(out, same, in_64)
    assert_within_2x(lse, lse_32, lse_64)


@STORED
@pytest.mark.parametrize(
    "options",
    [{}, {"window_size": (100, 0)}, {"softcap": 5.0, "causal": False}],
    ids=str,
)
def test_attention(device, dtype, stored, options):
    sequences = [(1, 1), (5, 69), (40, 1500), (3, 3), (0, 9)]
    case, scales = eight_bit(random_case(device, dtype, sequences), stored)
    assert_is_attention_of_what_is_stored(case, scales, options)


@STORED
@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads"),
    [
        (16, 1, (4, 4)),
        (24, 16, (4, 2)),
        (64, 100, (12, 2)),
        (80, 16, (8, 1)),
        (128, 16, (8, 2)),
        (192, 7, (6, 2)),
        (256, 64, (20, 1)),
    ],
)
def test_widths_and_pages(device, dtype, stored, head_dim, page_size, heads):
    case = random_case(device, dtype, [(1, 900), (2, 333), (1, 1)], heads, head_dim, page_size)
    case, scales = eight_bit(case, stored)
    terms = torch.randn(2, heads[0], device=device)
    options = {"sinks": terms[0], "alibi_slopes": terms[1].abs() / 10}
    assert_is_attention_of_what_is_stored(case, scales, options)


@STORED
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("batch", [1, 3])
def test_without_terms(device, dtype, stored, head_dim, batch):
    """No softcap, no ALiBi: on a GPU other kernels, on Hopper others again for one sequence."""
    case = random_case(device, dtype, [(1, 1100), (4, 300), (1, 1)][:batch], (16, 8), head_dim)
    case, scales = eight_bit(case, stored)
    assert_is_attention_of_what_is_stored(case, scales, {})


@STORED
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("splits", [{"split_size": 64}, {"num_splits": 3}], ids=str)
def test_fixed_splits(device, dtype, stored, head_dim, splits):
    sequences = [(1, 1), (5, 369), (15, 700), (40, 900), (3, 3), (0, 9)]
    case, scales = eight_bit(random_case(device, dtype, sequences, (8, 2), head_dim), stored)
    assert_is_attention_of_what_is_stored(case, scales, splits)
    terms = {"sinks": torch.randn(8, device=device), "window_size": (100, 0)}
    assert_is_attention_of_what_is_stored(case, scales, splits | terms)


@STORED
def test_one_scale_for_all(device, dtype, stored):
    case = random_case(device, dtype, [(1, 200), (2, 40)], (8, 2), 128)
    one = {name: torch.tensor([0.03], device=device) for name in ("k_scales", "v_scales")}
    k, v = (
        bits(in_8_bits(x.nan_to_num(0.0), one["k_scales"], stored)).view(stored)
        for x in (case.k_cache, case.v_cache)
    )
    case = replace(case, k_cache=k, v_cache=v)
    spread = {name: x.expand(k.shape[:-1]) for name, x in one.items()}
    assert_is_attention_of_what_is_stored(case, spread, {})
    for ours, wanted in zip(case.run(**one), case.run(**spread), strict=True):
        assert torch.equal(ours, wanted)


@STORED
@pytest.mark.parametrize("size", [1e-4, 3e3])
def test_large_and_small_numbers(device, dtype, stored, size):
    """Values whose scales float16 does not hold beside weights, queries whose size it does not."""
    case = random_case(device, dtype, [(1, 700), (2, 40)], (8, 2), 128)
    case = replace(case, q=case.q / size, k_cache=case.k_cache * size, v_cache=case.v_cache * size)
    case.v_cache[:, ::2] *= 1e-2
    case, scales = eight_bit(case, stored)
    assert_is_attention_of_what_is_stored(case, scales, {})


@STORED
def test_every_number(device, stored):
    """All 256 of them as values, each by a row that sees it alone."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    q = torch.zeros(256, 1, 16, device=device, dtype=dtype)
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    v_cache = numbers.view(256, 1, 1, 1).expand(-1, -1, -1, 16).contiguous().view(stored)
    k_cache = torch.zeros_like(bits(v_cache)).view(stored)
    lengths = torch.ones(256, dtype=torch.int32, device=device)
    starts = torch.arange(257, dtype=torch.int32, device=device)
    table = torch.arange(256, dtype=torch.int32, device=device)[:, None]
    scales = dict.fromkeys(("k_scales", "v_scales"), torch.tensor([0.5], device=device))
    where = (table, lengths, starts)
    out, _ = paged_attention(q, k_cache, v_cache, *where, max_seqlen_q=1, **scales)
    expected = v_cache.float()[:, 0] * 0.5
    known = expected.isfinite()
    assert torch.equal(out.float()[known], expected[known])


@STORED
def test_refusals(device, stored):
    case, scales = eight_bit(random_case(device, torch.float16, [(3, 5)]), stored)

    def refuses(*parts, case=case, **options):
        options = {**scales, **options}
        assert_refuses(lambda: case.run(**options), "paged_attention: ", *parts)

    name = str(stored)[6:]
    refuses(f"k_scales must be given beside a k_cache of {name}", k_scales=None)
    refuses("k_scales must be [1], or [num_blocks, page_size", k_scales=scales["k_scales"][1:])
    refuses("v_scales must be float32", v_scales=scales["v_scales"].half())
    other = replace(case, v_cache=case.v_cache.float())
    refuses("v_cache must have the dtype of k_cache", case=other)
    wide = multiplied_out(case, scales, torch.float16)
    refuses("k_scales must be None but beside caches of", case=wide)
    args = random_tokens(device, torch.float16, stored)

    def append_refuses(*parts, **changed):
        given = dict(zip(("k_scales", "v_scales"), args[5:], strict=True)) | changed
        assert_refuses(lambda: append_kv_(*args[:5], **given), "append_kv_: ", *parts)

    append_refuses(f"v_scales must be given beside a k_cache of {name}", v_scales=None)
    append_refuses("k_scales must be [1], or [num_blocks, page_size", k_scales=args[5][1:])
    append_refuses("v_scales must not overlap k_scales, got memory 0", v_scales=args[5])
    append_refuses("k_scales must not overlap itself", k_scales=args[5][:1].expand(args[5].shape))
    side_by_side = torch.zeros(*args[5].shape, 2, device=device)
    append_kv_(*args[:5], *side_by_side.unbind(-1))
    assert (side_by_side > 0).any((0, 1, 2)).all()
    broad = random_tokens(device, torch.float16, stored, head_dim=264)
    assert_refuses(lambda: append_kv_(*broad), "head_dim must be at most 256 beside caches of 8")


def test_opcheck(device):
    stored = torch.int8  # torch's check of schemas multiplies its inputs, which float8 does not do
    args = random_tokens(device, torch.float16, stored)
    run_opcheck("append_kv_", *args[:5], *(x.nan_to_num(0.0) for x in args[5:]))
    case, scales = eight_bit(random_case(device, torch.float16, [(1, 5), (1, 40)]), stored)
    scales = [x.nan_to_num(0.0) for x in scales.values()]
    none = (None, None, None, 0, 0)
    run_opcheck("paged_attention", *case.tensors(), 1, 0.125, True, -1, -1, 0.0, *none, *scales)


def attend_8_bit(stored):
    def run(q, k_cache, v_cache, table, lengths, starts, k_scales, v_scales):
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        caches = k_cache.view(stored), v_cache.view(stored)
        return paged_attention(q, *caches, table, lengths, starts, max_seqlen_q=1, **scales)

    return run


@STORED
def test_replay(device, stored):
    sequences = [(1, 300), (1, 7)]
    case, scales = eight_bit(random_case(device, torch.float16, sequences), stored)
    tensors = [bits(x) if x.dtype == stored else x for x in case.tensors()]
    shorter = torch.tensor([20, 3], dtype=torch.int32, device=device)
    other = (*tensors[:4], shorter, tensors[5], *scales.values())
    assert_replays(attend_8_bit(stored), (*tensors, *scales.values()), other)
    assert_replays(attend_8_bit(stored), other, (*tensors, *scales.values()))


def test_compile(device):
    inputs = []
    for count in (4, 5, 9):
        case = random_case(device, torch.float16, [(1, 9)] * count)
        case, scales = eight_bit(case, torch.int8)
        inputs.append((*case.tensors(), *scales.values()))
    assert_compiles(attend_8_bit(torch.int8), inputs)
