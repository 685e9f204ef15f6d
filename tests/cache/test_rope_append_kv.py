"""rope_append_kv_: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry import ops
from llamatelemetry.ops import reference, rope_append_kv_

ROTATED = [(64, 64), (128, 32), (80, 80), (6, 2), (100, 50), (256, 256), (24, 0)]


def random_case(
    device, dtype, heads=(6, 2), head_dim=64, rotary_dim=64, num_tokens=9, normed=False, page_size=4
):
    """qkv with NaN around it, cos, sin, positions, poisoned caches, slots of which one is -1."""
    total = heads[0] + 2 * heads[1]
    qkv = torch.full((num_tokens, total + 1, head_dim + 8), torch.nan, dtype=dtype, device=device)
    qkv = qkv[:, :total, :head_dim]
    qkv.copy_(torch.randn(qkv.shape))
    angles = torch.rand(20, rotary_dim, device=device) * 6
    caches = torch.full((2, 5, page_size, heads[1], head_dim), torch.nan, dtype=dtype).to(device)
    slots = torch.randperm(5 * page_size)[:num_tokens]
    slots[1:2] = -1
    weights = (torch.rand(2, head_dim, device=device) + 0.5).to(dtype) if normed else (None, None)
    return {
        "qkv": qkv,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "positions": torch.randint(0, 20, (num_tokens,), device=device),
        "interleaved": False,
        "k_cache": caches[0],
        "v_cache": caches[1],
        "slot_mapping": slots.to(device),
        "q_weight": weights[0],
        "k_weight": weights[1],
    }


def copy_of(case, dtype=None):
    copied = {}
    for name, x in case.items():
        is_tensor = isinstance(x, torch.Tensor)
        copied[name] = x.clone() if is_tensor else x
        if is_tensor and dtype and x.is_floating_point():
            copied[name] = x.to(dtype)
    return copied


def one_by_one(case, eps=1e-6, weight_offset=0.0):
    """The three ops that it is."""
    qkv, num_kv = case["qkv"], case["k_cache"].shape[2]
    q, k, v = qkv.split([qkv.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
    for x, name in ((q, "q_weight"), (k, "k_weight")):
        if case[name] is not None:
            x.copy_(ops.rms_norm(x.contiguous(), case[name], eps, weight_offset))
    ops.rotary_embedding_(q, k, *(case[n] for n in ("cos", "sin", "positions", "interleaved")))
    ops.append_kv_(k, v, *(case[n] for n in ("k_cache", "v_cache", "slot_mapping")))


def assert_is_the_three_ops(case, **norm):
    theirs, in_32, in_64 = copy_of(case), copy_of(case, torch.float32), copy_of(case, torch.double)
    rope_append_kv_(**case, **norm)
    one_by_one(theirs, **norm)
    is_normed = case["q_weight"] is not None or case["k_weight"] is not None
    if not is_normed or case["qkv"].device.type == "cpu":
        for name in ("qkv", "k_cache", "v_cache"):
            assert torch.equal(case[name].nan_to_num(7.0), theirs[name].nan_to_num(7.0))
        return
    # On a GPU a warp sums a head in another order than a block does.
    for wide in (in_32, in_64):
        reference.rope_append_kv_(**wide, **norm)
    for name in ("qkv", "k_cache", "v_cache"):
        written = in_64[name].isfinite()
        assert torch.equal(case[name].isfinite(), written)
        same_dtype = theirs[name] if case[name].dtype != torch.float32 else in_32[name]
        assert_within_2x(case[name][written], same_dtype[written], in_64[name][written])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), ROTATED)
def test_values(device, dtype, head_dim, rotary_dim, interleaved, normed):
    case = random_case(device, dtype, (6, 2), head_dim, rotary_dim, normed=normed)
    assert_is_the_three_ops(case | {"interleaved": interleaved})


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(device, dtype, offset):
    case = random_case(device, dtype, normed=True)
    assert_is_the_three_ops(copy_of(case), eps=1e-3, weight_offset=offset)
    for name in ("q_weight", "k_weight"):
        assert_is_the_three_ops(copy_of(case) | {name: None}, weight_offset=offset)


@pytest.mark.parametrize("heads", [(0, 1), (1, 1), (71, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_heads_and_tokens(device, dtype, heads, num_tokens):
    assert_is_the_three_ops(random_case(device, dtype, heads, 128, 128, num_tokens))


@pytest.mark.parametrize("index_dtype", [torch.int32, None])
def test_positions(device, dtype, index_dtype):
    case = random_case(device, dtype)
    positions = case["positions"].to(index_dtype) if index_dtype else None
    assert_is_the_three_ops(case | {"positions": positions})


def test_positions_and_slots_outside(device, dtype):
    case = random_case(device, dtype, num_tokens=6)
    outside = torch.tensor([3, -1, 20, 2**40, 0, 19], device=device)
    slots = torch.tensor([-1, 20, 2**62, -(2**63), 0, 19], device=device)
    assert_is_the_three_ops(case | {"positions": outside, "slot_mapping": slots})


def test_no_cache(device, dtype):
    case = random_case(device, dtype)
    empty = case["k_cache"][:0]
    assert_is_the_three_ops(case | {"k_cache": empty, "v_cache": empty.clone()})


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 64), (6, 2)])
def test_caches_of_8_bits(device, dtype, stored, head_dim, rotary_dim):
    """What append_kv_ makes of the keys and values that stand in qkv afterwards."""
    case = random_case(device, dtype, (6, 2), head_dim, rotary_dim)
    shape = case["k_cache"].shape
    caches = torch.zeros(4, *shape, dtype=torch.uint8, device=device).view(stored)
    scales = torch.full((4, *shape[:-1]), torch.nan, device=device)
    case["qkv"][3, 7, 0] = torch.inf
    given = {"k_cache": caches[0], "v_cache": caches[1]}
    rope_append_kv_(**(case | given), k_scales=scales[0], v_scales=scales[1])
    k, v = case["qkv"][:, 6:8], case["qkv"][:, 8:]
    ops.append_kv_(k, v, *caches[2:], case["slot_mapping"], *scales[2:])
    assert torch.equal(scales[:2].nan_to_num(7.0), scales[2:].nan_to_num(7.0))
    known = ~scales[:2].isnan()
    ours, wanted = caches.view(torch.uint8).view(2, 2, *shape)
    assert torch.equal(ours[known], wanted[known])
    assert known.any()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 64), (6, 2), (100, 100)])
def test_caches_of_16_bits_beside_float32(stored, head_dim, rotary_dim, normed):
    """What torch makes of the keys and values that stand in qkv afterwards, in their slots."""
    case = random_case("cpu", torch.float32, (6, 2), head_dim, rotary_dim, normed=normed)
    case["qkv"][3, 7, 0], case["qkv"][4, 8, 1] = torch.inf, 1e5
    wide = copy_of(case)
    rope_append_kv_(**wide)
    for name in ("k_cache", "v_cache"):
        case[name] = case[name].to(stored)
    rope_append_kv_(**case)
    assert torch.equal(case["qkv"].nan_to_num(7.0), wide["qkv"].nan_to_num(7.0))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(case[name].nan_to_num(7.0), wide[name].to(stored).nan_to_num(7.0))


@given(
    st.integers(0, 9),
    st.tuples(st.integers(0, 4), st.integers(1, 3)),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_any_sizes(num_tokens, heads, head_dim, interleaved, normed):
    torch.manual_seed(0)
    rotary_dim = head_dim // 3 * 2
    case = random_case("cpu", torch.bfloat16, heads, head_dim, rotary_dim, num_tokens, normed)
    assert_is_the_three_ops(case | {"interleaved": interleaved})


def test_refusals(device):
    case = random_case(device, torch.float32)

    def refuses(*parts, **changed):
        assert_refuses(lambda: rope_append_kv_(**(case | changed)), "rope_append_kv_: ", *parts)

    qkv = case["qkv"]
    refuses("qkv must be [num_tokens, num_heads_q + 2 * num_heads_kv, head_dim]", qkv=qkv[0])
    refuses("qkv must have at least the 2 * 2 heads of k and v, got 3", qkv=qkv[:, :3])
    refuses("qkv must have the head_dim of k_cache = 64, got 62", qkv=qkv[..., :62])
    refuses("qkv must have the dtype of k_cache", qkv=qkv.half())
    caches = {name: case[name].half() for name in ("k_cache", "v_cache")}
    takes = "(float16)" if device.type == "cuda" else "(float16) or float32"
    refuses(f"qkv must have the dtype of k_cache {takes}, got", **caches, qkv=qkv.bfloat16())
    refuses("qkv must have a contiguous last", qkv=qkv.repeat(1, 1, 2)[..., ::2])
    refuses("qkv must", qkv=qkv[:1].expand(9, -1, -1))
    wide = torch.zeros(1, 4, 1, 264, device=device)
    options = {"k_cache": wide, "v_cache": wide.clone(), "qkv": torch.zeros(9, 3, 264).to(device)}
    refuses("head_dim must be at most 256, got 264", **options)
    refuses("cos must be [positions, rotary_dim]", cos=case["cos"][0])
    refuses("cos must have an even rotary_dim <= head_dim = 64, got 63", cos=case["cos"][:, :63])
    refuses("sin must be the shape of cos", sin=case["sin"][1:])
    refuses("sin must have the dtype of qkv", sin=case["sin"].half())
    short = {"cos": case["cos"][:5], "sin": case["sin"][:5], "positions": None}
    refuses("cos must have a row for each of the 9 tokens, got 5 rows; or pass positions", **short)
    refuses("positions must be int64 or int32", positions=case["positions"].short())
    refuses("positions must be [num_tokens] = [9]", positions=case["positions"][1:])
    refuses("v_cache must be the shape of k_cache", v_cache=case["v_cache"][1:])
    refuses("slot_mapping must be [num_tokens] = [9]", slot_mapping=case["slot_mapping"][1:])
    refuses("slot_mapping must be int64", slot_mapping=case["slot_mapping"].int())
    refuses("q_weight must be [head_dim] = [64]", q_weight=torch.zeros(63, device=device))
    refuses("k_weight must have the dtype of qkv", k_weight=torch.zeros(64, device=device).half())
    with torch.inference_mode(False), torch.enable_grad():
        refuses("qkv must not require grad", qkv=torch.ones_like(qkv).requires_grad_())


@pytest.mark.parametrize("normed", [False, True])
def test_opcheck(device, dtype, normed):
    case = random_case(device, dtype, normed=normed)
    for name in ("k_cache", "v_cache"):
        case[name] = case[name].nan_to_num(0.0)
    run_opcheck("rope_append_kv_", *case.values(), 1e-6, 0.0)


def test_replay_with_other_values(device, dtype):
    first, second = (random_case(device, dtype, normed=True) for _ in range(2))

    def run(qkv, cos, sin, positions, k_cache, v_cache, slots, q_weight, k_weight):
        angles = (cos, sin, positions, True)
        rope_append_kv_(qkv, *angles, k_cache, v_cache, slots, q_weight, k_weight)
        return qkv, k_cache, v_cache

    def tensors(case):
        case["k_cache"], case["v_cache"] = torch.zeros_like(case["k_cache"]), case["k_cache"] * 0
        return tuple(x.nan_to_num(0.0) for n, x in case.items() if n != "interleaved")

    assert_replays(run, tensors(first), tensors(second))


def test_compile(device):
    def run(qkv, cos, sin, positions, k_cache, v_cache, slots):
        rope_append_kv_(qkv, cos, sin, positions, False, k_cache, v_cache, slots)
        return qkv

    def tensors(num_tokens):
        case = random_case(device, torch.float32, num_tokens=num_tokens, page_size=9)
        names = ("qkv", "cos", "sin", "positions", "k_cache", "v_cache", "slot_mapping")
        return tuple(case[name] for name in names)

    assert_compiles(run, [tensors(n) for n in (7, 8, 11)])  # no other size is as large
