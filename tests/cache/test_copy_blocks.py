"""copy_blocks_: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import copy_blocks_, reference


def random_case(device, dtype, num_pairs=3, page_size=4, heads=3, head_dim=16):
    """Caches of 20 blocks, and pairs of distinct blocks."""
    k_cache, v_cache = torch.randn(2, 20, page_size, heads, head_dim, device=device).to(dtype)
    return k_cache, v_cache, torch.randperm(20)[: 2 * num_pairs].view(num_pairs, 2).to(device)


def assert_same(k_cache, v_cache, pairs):
    expected = k_cache.clone(), v_cache.clone()
    reference.copy_blocks_(*expected, pairs)
    copy_blocks_(k_cache, v_cache, pairs)
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])


@pytest.mark.parametrize("num_pairs", [0, 1, 4])
@pytest.mark.parametrize(
    ("page_size", "heads", "head_dim"), [(1, 1, 1), (16, 2, 64), (7, 3, 5), (3, 0, 8)]
)
def test_values(device, dtype, num_pairs, page_size, heads, head_dim):
    assert_same(*random_case(device, dtype, num_pairs, page_size, heads, head_dim))


def test_any_block_and_slot_strides(device, dtype):
    everything = torch.randn(8, 4, 2, 3, 2, 6, device=device).to(dtype)
    untouched = everything[:, :, :, ::2].clone()
    pairs = torch.tensor([[0, 7], [0, 2], [5, 1]], device=device)
    assert_same(everything[:, :, 0, 1], everything[:, :, 1, 1], pairs)
    assert torch.equal(everything[:, :, :, ::2], untouched)


def test_pairs_outside_are_skipped(device, dtype):
    k_cache, v_cache, _ = random_case(device, dtype)
    pairs = torch.tensor([[-1, -1], [0, 20], [20, 0], [2**62, 1], [1, -(2**63)], [3, 3], [4, 5]])
    assert_same(k_cache, v_cache, pairs.to(device))


def test_refusals(device):
    k_cache, v_cache, pairs = random_case(device, torch.float32)

    def refuses(*parts, k_cache=k_cache, v_cache=v_cache, pairs=pairs):
        assert_refuses(lambda: copy_blocks_(k_cache, v_cache, pairs), "copy_blocks_: ", *parts)

    refuses("v_cache must be the shape of k_cache", v_cache=v_cache[1:])
    refuses("k_cache must have contiguous heads", k_cache=k_cache.transpose(1, 2))
    refuses("block_pairs must be [num_pairs, 2], got shape [2]", pairs=pairs[0])
    refuses("block_pairs must be [num_pairs, 2] = [2, 2], got shape [2, 3]", pairs=pairs.T)
    refuses("block_pairs must be int64, got int32", pairs=pairs.int())
    refuses("block_pairs must be contiguous", pairs=pairs.flip(1).T.contiguous().T)
    with torch.inference_mode(False), torch.enable_grad():
        refuses("v_cache must not require grad", v_cache=torch.ones(1, requires_grad=True))


def test_opcheck(device, dtype):
    run_opcheck("copy_blocks_", *random_case(device, dtype))
    run_opcheck("copy_blocks_", *random_case(device, dtype, num_pairs=0))


def test_is_torch_index_copy(device, dtype):
    k_cache, v_cache, pairs = random_case(device, dtype)
    expected = k_cache.clone().index_copy_(0, pairs[:, 1], k_cache[pairs[:, 0]])
    copy_blocks_(k_cache, v_cache, pairs)
    assert torch.equal(k_cache, expected)


def test_replay(device, dtype):
    assert_replays(copy_blocks_, random_case(device, dtype), random_case(device, dtype))


def test_compile(device):
    assert_compiles(copy_blocks_, [random_case(device, torch.float32, n) for n in (5, 7, 9)])
