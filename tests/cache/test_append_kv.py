"""append_kv_: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import append_kv_, reference


def random_case(device, dtype, num_tokens=7, num_blocks=5, page_size=4, heads=3, head_dim=16):
    """k, v (slices of one merged qkv), poisoned caches, distinct slots of which some are -1."""
    qkv = torch.randn(num_tokens, 3, heads, head_dim, device=device).to(dtype)
    caches = torch.full(
        (2, num_blocks, page_size, heads, head_dim), torch.nan, dtype=dtype, device=device
    )
    slots = torch.randperm(num_blocks * page_size)[:num_tokens]
    slots[torch.rand(num_tokens) < 0.2] = -1
    return qkv[:, 1], qkv[:, 2], caches[0], caches[1], slots.to(device)


def assert_same(args):
    k, v, k_cache, v_cache, slots = args
    expected = k_cache.clone(), v_cache.clone()
    reference.append_kv_(k, v, *expected, slots)
    append_kv_(*args)
    for ours, wanted in zip((k_cache, v_cache), expected, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 64), (16, 128), (7, 5), (128, 0)])
def test_values(device, dtype, num_tokens, page_size, head_dim):
    assert_same(random_case(device, dtype, num_tokens, 50, page_size, 2, head_dim))


@given(
    st.integers(0, 9), st.integers(0, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 40)
)
def test_any_sizes(num_tokens, num_blocks, page_size, heads, head_dim):
    num_tokens = min(num_tokens, num_blocks * page_size)
    assert_same(
        random_case("cpu", torch.bfloat16, num_tokens, num_blocks, page_size, heads, head_dim)
    )


def test_any_strides_and_offsets(device, dtype):
    # One layer of a cache that holds all layers, K beside V; sources at odd offsets and strides.
    everything = torch.full((6, 2, 3, 4, 2, 16), torch.nan, dtype=dtype, device=device)
    k_cache, v_cache = everything[:, 0, 1], everything[:, 1, 1]
    k = torch.randn(9, 5, 21, device=device).to(dtype)[:, 1:4:2, 3:19]
    v = torch.randn(2, 9, 17, device=device).to(dtype).transpose(0, 1)[:, :, 1:]
    slots = torch.randperm(24)[:9].to(device)
    assert_same((k, v, k_cache, v_cache, slots))
    assert everything[:, :, ::2].isnan().all(), "another layer was written"


def test_slots_outside_are_skipped(device, dtype):
    # The caches are the middle of a poisoned buffer: writing past either end would show.
    buffer = torch.full((2, 6, 4, 3, 16), torch.nan, dtype=dtype, device=device)
    k, v = torch.ones(2, 6, 3, 16, dtype=dtype, device=device)
    slots = torch.tensor([-1, -2, 8, 2**62, -(2**63), 7], device=device)
    append_kv_(k, v, buffer[0, 2:4], buffer[1, 2:4], slots)
    written = (~buffer.isnan()).nonzero()
    assert written[:, 1:3].unique(dim=0).tolist() == [[3, 3]]
    assert written.shape[0] == 2 * 3 * 16


def test_refusals(device):
    k, v, k_cache, v_cache, slots = random_case(device, torch.float32)

    def refuses(*parts, k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots):
        assert_refuses(lambda: append_kv_(k, v, k_cache, v_cache, slots), "append_kv_: ", *parts)

    refuses("k_cache must be [num_blocks, page_size, num_heads_kv, head_dim]", k_cache=k_cache[0])
    refuses("v_cache must be the shape of k_cache = [5, 4, 3, 16]", v_cache=v_cache[1:])
    refuses("v_cache must have the dtype of k_cache", v_cache=v_cache.half())
    refuses(
        "k_cache must be float32, float16, bfloat16, float8_e4m3fn or int8, got float64",
        k_cache=k_cache.double(),
    )
    refuses("v_cache must not overlap k_cache, got memory 0 elements from it", v_cache=k_cache)
    refuses("k_cache must not overlap itself", k_cache=k_cache[:1].expand(k_cache.shape))
    refuses("k_cache must have contiguous heads", "stride 48", k_cache=k_cache.transpose(1, 2))
    refuses("k_cache must have a contiguous last dimension", k_cache=k_cache.transpose(2, 3))
    refuses("k must be [num_tokens, num_heads_kv, head_dim], got shape [7, 3]", k=k[:, :, 0])
    refuses("k must be", "= [7, 3, 16], got shape [7, 2, 16]", k=k[:, :2])
    refuses("v must be", "= [7, 3, 16], got shape [6, 3, 16]", v=v[1:])
    refuses("v must have the dtype of k (float32), got bfloat16", v=v.bfloat16())
    refuses("k must have a contiguous last dimension", k=k.repeat_interleave(2, -1)[..., ::2])
    refuses("slot_mapping must be [num_tokens] = [7], got shape [6]", slots=slots[1:])
    refuses("slot_mapping must be int64, got int32", slots=slots.int())
    refuses("slot_mapping must be contiguous", slots=slots.repeat_interleave(2)[::2])
    with torch.inference_mode(False), torch.enable_grad():
        refuses("k must not require grad", k=torch.ones(7, 3, 16, requires_grad=True))


def test_opcheck(device, dtype):
    run_opcheck("append_kv_", *random_case(device, dtype))
    _, _, k_cache, v_cache, slots = random_case(device, dtype)
    nothing = k_cache.new_empty(0, 3, 16)
    run_opcheck("append_kv_", nothing, nothing.clone(), k_cache, v_cache, slots[:0])


def test_is_torch_index_put(device, dtype):
    k, v, k_cache, v_cache, _ = random_case(device, dtype)
    slots = torch.randperm(20, device=device)[:7]
    expected = k_cache.clone().view(20, 3, 16).index_copy_(0, slots, k)
    append_kv_(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(20, 3, 16).nan_to_num(7.0), expected.nan_to_num(7.0))


def test_replay(device, dtype):
    assert_replays(append_kv_, random_case(device, dtype), random_case(device, dtype))


def test_compile(device):
    assert_compiles(append_kv_, [random_case(device, torch.float32, n) for n in (2, 5, 9)])
