"""KVCache and PagedKVCache by hand, compiled and captured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch.nn.functional import scaled_dot_product_attention

from llamatelemetry.inference.block_manager import OutOfBlocks
from llamatelemetry.inference.kv_cache import (
    KVCache,
    KVCacheConfig,
    PagedKVCache,
    kv_cache_bytes,
)
from llamatelemetry.ops import paged_attention

SMALL = {"num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 8, "dtype": torch.float32}


def small(device, **changed):
    sizes = {"max_batch_size": 2, "max_seq_length": 10} | SMALL
    return KVCacheConfig(**(sizes | {"device": device} | changed))


def random_kv(device, *leading):
    return torch.randn(2, *leading, 3, 8, device=device).unbind(0)


def test_the_formula_and_the_defaults():
    # Llama-2-70B at 8K in float16, with its 8 key heads and as if it had 64.
    assert round(kv_cache_bytes(80, 8, 128, 8192, torch.float16) / 1e9, 1) == 2.7
    assert round(kv_cache_bytes(80, 64, 128, 8192, torch.float16) / 1e9, 1) == 21.5
    config = KVCacheConfig()
    assert (config.max_batch_size, config.max_seq_length, config.num_layers) == (8, 4096, 32)
    assert (config.num_heads, config.head_dim, config.dtype) == (32, 128, torch.float16)
    assert config.kv_heads == 32
    assert config.num_bytes == 8 * kv_cache_bytes(32, 32, 128, 4096, torch.float16)
    cache = KVCache(small("cpu"))
    assert cache.keys.nbytes + cache.values.nbytes == cache.config.num_bytes
    paged = PagedKVCache(small("cpu"), page_size=5)
    assert paged.pages.num_bytes == cache.config.num_bytes


def test_updates_are_views_of_all_that_was_added(device):
    cache = KVCache(small(device))
    assert cache.get(1) is None
    first, second = random_kv(device, 2, 4), random_kv(device, 2, 3)
    k, _ = cache.update(1, *first)
    address = k.data_ptr()
    k, v = cache.update(1, *second)
    assert k.data_ptr() == address == cache.keys[1].data_ptr()
    assert torch.equal(k, torch.cat([first[0], second[0]], 1))
    assert torch.equal(v, torch.cat([first[1], second[1]], 1))
    assert all(torch.equal(a, b) for a, b in zip(cache.get(1), (k, v), strict=True))
    assert (cache.length(0), cache.length(1), cache.get(0)) == (0, 7, None)
    cache.clear()
    assert (cache.get(1), cache.keys.data_ptr() <= address) == (None, True)
    cache.update(1, *random_kv(device, 1, 10))
    assert cache.length(1) == 10


def test_positions_are_honoured(device):
    cache = KVCache(small(device))
    k, v = random_kv(device, 2, 3)
    positions = torch.tensor([[0, 9, 4], [2, 10, -1]], device=device)  # two are outside
    keys, values = cache.update(0, k, v, positions)
    expected = torch.zeros(2, 2, 10, 3, 8, device=device)
    for x, out in ((k, expected[0]), (v, expected[1])):
        out[0, [0, 9, 4]], out[1, 2] = x[0], x[1, 0]
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    cache.update(1, k, v, torch.tensor([5, 6, 7], device=device))
    assert torch.equal(cache.get(1)[0][:, 5:8], k)
    cache.update(1, k[:, 1:2], v[:, 1:2], torch.tensor([5], device=device))
    assert torch.equal(cache.get(1)[0][:, 5:8], k[:, [1, 1, 2]])


def test_positions_are_checked_by_name(device):
    cache = KVCache(small(device))
    k, v = random_kv(device, 2, 3)
    place = torch.arange(3, device=device)
    for positions, sentence in [
        (place.view(1, 1, 3), r"positions must be \[3\] or \[2, 3\] .*got shape \[1, 1, 3\]"),
        (place[:2], r"positions must be .*got shape \[2\]"),
        (place.float(), "positions must be torch.int64 on .*, got torch.float32"),
        (place.int(), "positions must be torch.int64 on .*, got torch.int32"),
        ([0, 1, 2], "positions must be a tensor, got list"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            cache.update(0, k, v, positions)
    assert cache.get(0) is None
    assert torch.equal(cache.update(0, k, v, place[None])[0][:, :3], k)


def test_nothing_is_appended_after_positions(device):
    cache = KVCache(small(device))
    k, v = random_kv(device, 2, 3)
    cache.update(0, k, v, torch.arange(3, device=device))
    with pytest.raises(RuntimeError, match="positions must be given for layer 0, which was given"):
        cache.update(0, k, v)
    assert cache.length(0) == 10
    assert torch.equal(cache.get(0)[0][:, :3], k)
    cache.clear()
    assert torch.equal(cache.update(0, k, v)[0], k)


def test_one_compiled_update_serves_every_position(device):
    with torch.inference_mode(False):
        cache = KVCache(small(device))
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def update(k, v, positions):
        return cache.update(0, k, v, positions)[0].sum()

    compiled = torch.compile(update, fullgraph=True, backend=frames)
    with torch.inference_mode(False), torch.no_grad():
        total = torch.zeros((), device=device)
        for position in range(5):
            k, v = random_kv(device, 2, 1)
            total = total + k.sum()
            ours = compiled(k, v, torch.tensor([position], device=device))
            torch.testing.assert_close(ours, total)
    assert frames.frame_count <= 2  # the layer is empty before the first and not after it


@pytest.mark.gpu
def test_a_captured_update_serves_every_position():
    cache = KVCache(small("cuda"))
    k, v = random_kv("cuda", 2, 1)
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    cache.update(0, k, v, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.update(0, k, v, position)
    for i in range(1, 10):
        position.fill_(i)
        k.fill_(i)
        graph.replay()
    assert cache.keys[0, :, 1:, 0, 0].tolist() == [[float(i) for i in range(1, 10)]] * 2


def test_refusals(device):
    cache = KVCache(small(device))
    k, v = random_kv(device, 2, 4)
    cache.update(0, k, v)
    for call, kind, sentence in [
        (lambda: cache.update(2, k, v), ValueError, r"layer_idx must lie in \[0, 2\), got 2"),
        (lambda: cache.update(1, k[0], v), ValueError, r"k must be .*, got shape \[4, 3, 8\]"),
        (lambda: cache.update(1, k, v[:, 1:]), ValueError, r"v must be .*, got shape \[2, 3, 3, 8"),
        (lambda: cache.update(1, k.half(), v), ValueError, "k must be torch.float32 on"),
        (lambda: cache.update(0, k[:1], v[:1]), ValueError, "batch must be 2, got 1; clear"),
        (
            lambda: cache.update(1, *random_kv(device, 3, 1)),
            ValueError,
            "batch must be at most 2, got 3",
        ),
        (
            lambda: cache.update(0, *random_kv(device, 2, 7)),
            RuntimeError,
            r"max_seq_length = 10, got 4 \+ 7 tokens in layer 0",
        ),
        (lambda: KVCacheConfig(num_layers=0), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: KVCacheConfig(head_dim=2.5), ValueError, "head_dim must be a whole number"),
        (lambda: KVCacheConfig(num_kv_heads=0), ValueError, "num_kv_heads must be at least 1"),
        (lambda: KVCacheConfig(num_kv_heads=5), ValueError, "num_kv_heads must divide num_heads"),
        (lambda: PagedKVCache(page_size=0), ValueError, "page_size must be at least 1, got 0"),
        (lambda: PagedKVCache(small("cpu"), num_layers=1), ValueError, "from config or keywords"),
    ]:
        with pytest.raises(kind, match=sentence):
            call()
    assert cache.length(0) == 4
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="k must not require grad"),
    ):
        cache.update(1, torch.ones(1, 1, 3, 8, device=device, requires_grad=True), v)


def paged(device, num_blocks=6, block_size=4):
    return PagedKVCache(num_blocks=num_blocks, block_size=block_size, device=device, **SMALL)


def fill(cache, sequence, begin, device):
    k, v = random_kv(device, cache.length(sequence) - begin)
    for layer in range(2):
        cache.update(layer, k + layer, v + layer, cache.slot_mapping(sequence, begin))
    return k, v


def test_pages_hold_what_sequences_were_given(device):
    cache = paged(device)
    assert cache.pages.layers[0][0].shape == (6, 4, 3, 8)
    assert cache.allocate("a", [1, 2, 3, 4, 5, 6]) == 0
    k, v = fill(cache, "a", 0, device)
    cache.commit("a")
    cache.fork("a", "b")
    cache.append("b", [7])  # copies the tail block that both held
    more_k, more_v = fill(cache, "b", 6, device)
    cache.append("a", 1)
    other_k, _ = fill(cache, "a", 6, device)
    cache.check()
    assert torch.equal(cache.get(1, "a")[0], torch.cat([k, other_k]) + 1)
    assert torch.equal(cache.get(1, "b")[0], torch.cat([k, more_k]) + 1)
    assert torch.equal(cache.get(0, "b")[1], torch.cat([v, more_v]))
    table = cache.block_table(["a", "b"])
    assert table.dtype == torch.int32
    assert (table[0, 0] == table[1, 0]).item()
    assert table[0, 1] != table[1, 1]
    assert cache.allocate("c", [1, 2, 3, 4, 9]) == 4
    assert torch.equal(cache.get(0, "c")[0][:4], k[:4])
    q = torch.randn(2, 6, 8, device=device)
    lengths = torch.tensor([7, 7], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    args = (q, *cache.pages.layers[0], table, lengths, starts)
    out, _ = paged_attention(*args, max_seqlen_q=1)
    k_b, v_b = (x.transpose(0, 1) for x in cache.get(0, "b"))
    wanted = scaled_dot_product_attention(q[1][:, None], k_b, v_b, enable_gqa=True)
    torch.testing.assert_close(out[1], wanted[:, 0])


def test_out_of_memory_and_clear(device):
    cache = paged(device, num_blocks=2)
    cache.allocate("a", 5)
    with pytest.raises(OutOfBlocks, match="Out of KV cache memory: 1 more blocks of 4 tokens"):
        cache.append("a", 4)
    with pytest.raises(RuntimeError, match=r"0 available of 2 \(1 sequences at work\)"):
        cache.allocate("b", [1])
    assert cache.length("a") == 5
    cache.free("a")
    cache.allocate("b", 8)
    cache.clear()
    cache.check()
    assert cache.blocks.num_available == 2
    cache.allocate("b")
    assert cache.get(0, "b") is None


def test_tokens_that_nobody_named_are_not_shared(device):
    cache = paged(device)
    for name in ("a", "b"):
        assert cache.allocate(name, 9) == 0
        cache.commit(name)
    cache.check()


def test_a_config_limits_sequences_and_their_lengths():
    cache = PagedKVCache(small("cpu", max_batch_size=1, max_seq_length=8), page_size=16)
    with pytest.raises(RuntimeError, match=r"max_seq_length = 8, got 0 \+ 16 tokens for 'a'"):
        cache.allocate("a", 16)
    cache.allocate("a", 7)
    with pytest.raises(RuntimeError, match=r"max_seq_length = 8, got 7 \+ 2 tokens for 'a'"):
        cache.append("a", 2)
    cache.append("a")
    for call in (lambda: cache.allocate("b"), lambda: cache.fork("a", "b")):
        with pytest.raises(RuntimeError, match=r"at most max_batch_size = 1, got 1 \+ 1"):
            call()
    assert cache.blocks.sequences() == ["a"]
    with pytest.raises(ValueError, match="must be a new one, got 'a' again"):
        cache.allocate("a")
    by_name = PagedKVCache(num_blocks=9, block_size=4, max_seq_length=8, **SMALL)
    with pytest.raises(RuntimeError, match="max_seq_length = 8"):
        by_name.allocate("a", 9)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (-3, "number of tokens must be at least 0, got -3"),
        (2.5, "tokens, or their number, must be a whole number, got 2.5"),
        (True, "must be a whole number, got True"),
        ([1, -2], "a token must be at least 0, got -2"),
        ([1, 2.0], "a token must be a whole number, got 2.0"),
        (torch.ones(1, 2), r"a token must be a whole number, got \[1.0, 1.0\]"),
    ],
)
def test_tokens_and_counts_are_checked(tokens, sentence):
    cache = paged("cpu")
    cache.allocate("a", [5])
    for call in (cache.allocate, cache.append):
        with pytest.raises(ValueError, match=sentence):
            call("a" if call == cache.append else "b", tokens)
    assert cache.length("a") == 1
    assert cache.blocks.sequences() == ["a"]


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple, list])
def test_prefixes_are_shared_whatever_holds_the_ids(kind):
    cache = paged("cpu")
    cache.allocate("a", kind([1, 2, 3, 4, 5]))
    cache.commit("a")
    assert cache.allocate("b", kind([1, 2, 3, 4, 6])) == 4
