"""The guide's sections on attention, caches, batching and profiling, as test_guide.py does."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest
import torch
from engines import make_engine
from families import VOCAB, tiny_model
from torch import nn
from torch.nn import functional as F

from llamatelemetry.inference import (
    BatchConfig,
    BatchInferenceOptimizer,
    ContinuousBatching,
    FlashAttentionConfig,
    KVCache,
    KVCacheConfig,
    PagedKVCache,
    batch_inference_optimized,
    check_flash_attention_available,
    disable_flash_attention,
    enable_flash_attention,
    flash_attention_forward,
    get_optimal_context_length,
    optimize_kv_cache,
    restore_kv_cache,
)
from llamatelemetry.ops import paged_attention
from llamatelemetry.profiling import check_memory, profile_model

close = torch.testing.assert_close


# Flash attention


def test_flash_attention_function(device):
    q = torch.randn(2, 128, 8, 64, device=device)
    k, v = torch.randn(2, 2, 128, 2, 64, device=device)
    out = flash_attention_forward(q, k, v, causal=True)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    want = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    close(out, want.transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert check_flash_attention_available()
    assert get_optimal_context_length(1.0, 12.0, use_flash_attention=True) == 8192


def test_flash_attention_of_a_model(device):
    model = tiny_model("llama", device)
    ids = torch.randint(VOCAB, (2, 24), device=device)
    before = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    enable_flash_attention(model, FlashAttentionConfig(causal=True))
    close(model(ids).logits, before, rtol=1e-4, atol=1e-3)
    again = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(again, tokens)
    disable_flash_attention(model)
    assert torch.equal(model(ids).logits, before)


def test_flash_attention_of_any_module(device):
    with torch.inference_mode(False):
        layer = nn.MultiheadAttention(64, 4, batch_first=True).eval().to(device)
    x = torch.randn(2, 40, 64, device=device)
    before = layer(x, x, x, need_weights=False)[0]
    enable_flash_attention(layer)
    close(layer(x, x, x, need_weights=False)[0], before, rtol=1e-4, atol=1e-5)
    enable_flash_attention(layer, FlashAttentionConfig(window_size=(0, 0)))
    near = layer(x, x, x, need_weights=False)[0]  # each query sees its own key alone
    values = F.linear(x, layer.in_proj_weight[128:], layer.in_proj_bias[128:])
    close(near, layer.out_proj(values), rtol=1e-4, atol=1e-5)
    disable_flash_attention(layer)
    assert torch.equal(layer(x, x, x, need_weights=False)[0], before)


def test_flash_attention_with_gradients_and_dropout(device):
    q, k, v = torch.randn(3, 1, 32, 4, 64, device=device)
    assert flash_attention_forward(q, k, v, window_size=None).is_contiguous()
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        dropped = flash_attention_forward(q, k, v, dropout_p=0.5)
        whole = flash_attention_forward(q, k, v)
        dropped.square().sum().backward()
    assert not torch.allclose(dropped, whole, atol=1e-3)
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))


# KV caches


def test_kv_cache(device):
    config = KVCacheConfig(
        max_batch_size=2,
        max_seq_length=32,
        num_layers=2,
        num_heads=4,
        head_dim=16,
        dtype=torch.float32,
        device=device,
    )
    cache = KVCache(config)
    keys, values = torch.randn(2, 2, 12, 4, 16, device=device)
    cache.update(0, keys[:, :8], values[:, :8])
    for i in range(8, 12):
        all_keys, all_values = cache.update(0, keys[:, i : i + 1], values[:, i : i + 1])
    assert torch.equal(all_keys, keys)
    assert torch.equal(all_values, values)
    query = torch.randn(2, 1, 4, 16, device=device)
    whole = flash_attention_forward(query, keys, values)
    close(flash_attention_forward(query, *cache.get(0)), whole, rtol=0, atol=1e-6)
    assert cache.get(1) is None
    cache.clear()
    assert cache.get(0) is None


def test_kv_cache_honours_positions(device):
    sizes = {"num_layers": 1, "num_heads": 2, "head_dim": 16, "dtype": torch.float32}
    cache = KVCache(KVCacheConfig(max_batch_size=1, max_seq_length=8, device=device, **sizes))
    k, v = torch.randn(2, 1, 3, 2, 16, device=device)
    keys, values = cache.update(0, k, v, positions=torch.tensor([4, 0, 6], device=device))
    assert torch.equal(keys[0, [4, 0, 6]], k[0])
    assert torch.equal(values[0, [4, 0, 6]], v[0])
    assert not keys[0, [1, 2, 3, 5, 7]].any()


def test_paged_kv_cache(device):
    cache = PagedKVCache(
        num_blocks=8, block_size=4, num_layers=1, num_heads=2, head_dim=16,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    keys, values = torch.randn(2, 10, 2, 16, device=device)
    assert cache.allocate("first", list(range(10))) == 0
    pages = cache.update(0, keys, values, cache.slot_mapping("first"))
    cache.commit("first")
    query = torch.randn(1, 2, 16, device=device)
    lengths, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([10], [0, 1]))
    table = cache.block_table(["first"])
    out, _ = paged_attention(query, *pages, table, lengths, starts, max_seqlen_q=1)
    want = flash_attention_forward(query[None], keys[None], values[None])[0]
    close(out, want, rtol=1e-4, atol=1e-5)
    assert cache.allocate("second", [*range(9), 99]) == 8  # two full blocks are shared
    cache.fork("first", "third")
    cache.append("third", [10])
    cache.check()
    with pytest.raises(RuntimeError, match="Out of KV cache memory"):
        cache.append("third", 100)
    for name in ("first", "second", "third"):
        cache.free(name)
    cache.check()


def test_generate_with_our_cache(device):
    model = tiny_model("llama", device)
    ids = torch.randint(VOCAB, (2, 6), device=device)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **asked)
    optimize_kv_cache(model)
    assert torch.equal(model.generate(ids, **asked), want)
    restore_kv_cache(model)
    assert torch.equal(model.generate(ids, **asked), want)


# Batching


def test_engine(tmp_path, device):
    engine, _ = make_engine(tmp_path, device)
    results = [engine.infer([5, 9, 2], max_tokens=6, seed=seed) for seed in (0, 0, 1)]
    assert [result.success for result in results] == [True] * 3, results[0].error_message
    assert results[0].text == results[1].text
    assert {result.tokens_generated for result in results} == {6}
    assert min(result.tokens_per_sec for result in results) > 0
    prompts = [[5, 9, 2], [7, 1], [11, 3, 8]]
    several = batch_inference_optimized(prompts, engine, max_tokens=4, temperature=0.0)
    alone = [engine.infer(prompt, max_tokens=4, temperature=0.0).text for prompt in prompts]
    assert [result.text for result in several] == alone


def test_batches(device):
    model = tiny_model("llama", device)
    sizes = []

    def last_token(prompts: list[list[int]], temperature: float = 0.0) -> list[int]:
        sizes.append(len(prompts))
        assert temperature == 0.5
        mask = torch.zeros(len(prompts), 8, dtype=torch.long, device=device)
        ids = mask.clone()
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, -len(prompt) :] = 1
        return model(ids, attention_mask=mask).logits[:, -1].argmax(-1).tolist()

    prompts = [[1 + i, 2 + i, 3 + i][: 1 + i % 3] for i in range(7)]
    want = [model(torch.tensor([p], device=device)).logits[0, -1].argmax().item() for p in prompts]
    optimizer = BatchInferenceOptimizer(BatchConfig(max_batch_size=4, max_tokens=64))
    assert optimizer.batch_infer(prompts, last_token, temperature=0.5) == want
    assert sorted(sizes) == [3, 4]
    assert batch_inference_optimized(prompts, last_token, max_batch_size=2, temperature=0.5) == want
    with pytest.raises(ValueError, match="must have a method infer or be callable"):
        batch_inference_optimized(prompts, object())


def test_one_failing_prompt_loses_no_other():
    def half(prompt):
        if prompt == "bad":
            raise KeyError(prompt)
        return len(prompt) / 2

    with pytest.raises(KeyError) as raised:
        BatchInferenceOptimizer().batch_infer(["four", "bad", "twelve"], half)
    assert raised.value.results == [2.0, None, 3.0]


def test_continuous_batching(device):
    model = tiny_model("llama", device)
    prompts, counts = [[1 + i, 2 + i, 3 + i] for i in range(5)], [3, 7, 5, 4, 6]
    want = []
    for prompt, count in zip(prompts, counts, strict=True):
        ids = torch.tensor([prompt], device=device)
        asked = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        want.append(model.generate(ids, **asked)[0, 3:].tolist())
    batcher = ContinuousBatching(max_batch_size=2, engine=model)
    assert batcher.max_batch_size == 2
    handles = [batcher.submit(p, max_tokens=n) for p, n in zip(prompts, counts, strict=True)]
    cancelled = batcher.submit([9, 8, 7], max_tokens=50)
    assert len(batcher.active_requests) == 6
    assert list(handles[0].tokens()) == want[0]
    assert cancelled.cancel()
    batcher.run()
    assert batcher.active_requests == []
    assert [handle.result().token_ids for handle in handles] == want
    with pytest.raises(CancelledError):
        cancelled.result()


# Profiling


def test_profile_and_memory(device):
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU()).eval().to(device)
    x = torch.randn(8, 64, device=device)
    found = profile_model(model, x, warmup=1, active=3)
    assert len(found.latencies_ms) == 3
    assert found.device.startswith(device.type)
    assert any("addmm" in op.name or "linear" in op.name for op in found.ops)
    assert device.type in {memory.device.partition(":")[0] for memory in check_memory()}
