"""swap_blocks_: values, refusals, opcheck, reference, replay; compile; host memory on a GPU."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import reference, swap_blocks_


def random_case(device, dtype, num_pairs=3, page_size=4, heads=3, head_dim=16):
    """Caches of 20 and of 9 blocks, and pairs of distinct blocks of each."""
    k_from, v_from = torch.randn(2, 20, page_size, heads, head_dim, device=device).to(dtype)
    k_to, v_to = torch.randn(2, 9, page_size, heads, head_dim, device=device).to(dtype)
    pairs = torch.stack([torch.randperm(n)[:num_pairs] for n in (20, 9)], 1).to(device)
    return k_from, v_from, k_to, v_to, pairs


def assert_same(k_from, v_from, k_to, v_to, pairs):
    expected = k_to.clone(), v_to.clone()
    reference.swap_blocks_(k_from, v_from, *expected, pairs)
    swap_blocks_(k_from, v_from, k_to, v_to, pairs)
    if k_from.is_cuda:
        torch.cuda.synchronize()
    assert torch.equal(k_to, expected[0])
    assert torch.equal(v_to, expected[1])


@pytest.mark.parametrize("num_pairs", [0, 1, 4])
@pytest.mark.parametrize(
    ("page_size", "heads", "head_dim"), [(1, 1, 1), (16, 2, 64), (7, 3, 5), (3, 0, 8)]
)
def test_values(device, dtype, num_pairs, page_size, heads, head_dim):
    assert_same(*random_case(device, dtype, num_pairs, page_size, heads, head_dim))


def test_any_block_and_slot_strides(device, dtype):
    source, target = torch.randn(2, 8, 4, 2, 3, 2, 6, device=device).to(dtype)
    untouched = target[:, :, :, ::2].clone()
    pairs = torch.tensor([[0, 7], [0, 2], [5, 1]], device=device)
    planes = [x[:, :, i, 1] for x in (source, target) for i in range(2)]
    assert_same(*planes, pairs)
    assert torch.equal(target[:, :, :, ::2], untouched)


def test_pairs_outside_are_skipped(device, dtype):
    *caches, _ = random_case(device, dtype)
    pairs = torch.tensor([[-1, -1], [0, 9], [20, 0], [2**62, 1], [1, -(2**63)], [3, 3], [19, 8]])
    assert_same(*caches, pairs.to(device))


def test_refusals(device):
    names = ("k_from", "v_from", "k_to", "v_to", "pairs")
    case = dict(zip(names, random_case(device, torch.float32), strict=True))

    def refuses(*parts, **changed):
        args = (case | changed).values()
        assert_refuses(lambda: swap_blocks_(*args), "swap_blocks_: ", *parts)

    refuses("v_from must be the shape of k_from", v_from=case["v_from"][1:])
    refuses("v_to must be the shape of k_to", v_to=case["v_to"][1:])
    refuses("k_to must have contiguous heads", k_to=case["k_to"].transpose(1, 2))
    other = case["k_to"][:, :2]
    refuses(
        "k_to must be [num_blocks, page_size, num_heads_kv, head_dim] as k_from is = [9, 4, 3, 16]",
        k_to=other,
        v_to=other,
    )
    half = case["k_to"].half()
    refuses("k_to must be float32, got float16", k_to=half, v_to=half)
    overlap = "v_to must not overlap k_to, got memory "
    refuses(overlap + "0 elements from it", v_to=case["k_to"])
    both = torch.zeros(10, *case["k_to"].shape[1:], device=device)
    refuses(overlap + "192 elements", k_to=both[:9], v_to=both[1:])
    rows = torch.zeros(9, 4, 7, 16, device=device)  # k beside v in each slot, and one head of both
    swap_blocks_(case["k_from"], case["v_from"], rows[:, :, :3], rows[:, :, 3:6], case["pairs"])
    refuses(overlap + "32 elements", k_to=rows[:, :, :3], v_to=rows[:, :, 2:5])
    refuses("v_to must not overlap itself", v_to=case["k_to"][:, :1].expand(9, 4, 3, 16))
    refuses("block_pairs must be [num_pairs, 2], got shape [2]", pairs=case["pairs"][0])
    refuses("block_pairs must be int64, got int32", pairs=case["pairs"].int())
    with torch.inference_mode(False), torch.enable_grad():
        refuses("v_to must not require grad", v_to=torch.ones(1, requires_grad=True))


def test_opcheck(device, dtype):
    run_opcheck("swap_blocks_", *random_case(device, dtype))
    run_opcheck("swap_blocks_", *random_case(device, dtype, num_pairs=0))


def test_is_torch_index_copy(device, dtype):
    k_from, v_from, k_to, v_to, pairs = random_case(device, dtype)
    expected = k_to.clone().index_copy_(0, pairs[:, 1], k_from[pairs[:, 0]])
    swap_blocks_(k_from, v_from, k_to, v_to, pairs)
    assert torch.equal(k_to, expected)


def test_replay(device, dtype):
    assert_replays(swap_blocks_, random_case(device, dtype), random_case(device, dtype))


def test_compile(device):
    assert_compiles(swap_blocks_, [random_case(device, torch.float32, n) for n in (5, 7, 9)])


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("head_dim", [1, 33, 128])
def test_to_the_host_and_back_on_a_side_stream(dtype, page_size, head_dim):
    k, v, _, _, pairs = random_case("cuda", dtype, 9, page_size, 3, head_dim)
    kept = k.clone(), v.clone()
    host = [torch.zeros(9, *k.shape[1:], dtype=dtype).pin_memory() for _ in range(2)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        swap_blocks_(k, v, *host, pairs)
        k.zero_()
        v.zero_()
        swap_blocks_(*host, k, v, pairs.flip(1).contiguous())
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    for cache, before, there in zip((k, v), kept, host, strict=True):
        src, dst = pairs.unbind(1)
        assert torch.equal(cache[src], before[src])
        assert torch.equal(there[dst.cpu()], before[src].cpu())


@pytest.mark.gpu
def test_a_graph_swaps_other_blocks_at_replay():
    k, v, _, _, pairs = random_case("cuda", torch.bfloat16, 4)
    host = [torch.zeros(9, *k.shape[1:], dtype=k.dtype).pin_memory() for _ in range(2)]
    swap_blocks_(k, v, *host, pairs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        swap_blocks_(k, v, *host, pairs)
    pairs.copy_(torch.tensor([[19, 0], [-1, -1], [4, 8], [7, 3]]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(host[0][[0, 8, 3]], k[[19, 4, 7]].cpu())
    assert torch.equal(host[1][[0, 8, 3]], v[[19, 4, 7]].cpu())


@pytest.mark.gpu
def test_memory_that_the_gpu_cannot_reach_is_refused():
    k, v, _, _, pairs = random_case("cuda", torch.float32)
    hosts = [torch.zeros(9, *k.shape[1:]) for _ in range(2)]
    assert_refuses(lambda: swap_blocks_(k, v, *hosts, pairs), "swap_blocks_: ", "pinned")
    hosts = [host.pin_memory() for host in hosts]
    assert_refuses(
        lambda: swap_blocks_(k, v, *hosts, pairs.cpu()),
        "block_pairs must be on the device of k_from (device 0), got cpu",
    )
