"""PagedKVCache and ContinuousBatching over pages of float8_e4m3fn and int8."""

from __future__ import annotations

import pytest
import torch
from batching import COUNTS, PAGE, PROMPTS, alone, is_free
from families import tiny_model

from llamatelemetry.inference import running_batch
from llamatelemetry.inference.continuous import ContinuousBatching
from llamatelemetry.inference.kv_cache import KVCache, KVCacheConfig, PagedKVCache
from llamatelemetry.models.patching import patch
from llamatelemetry.ops import paged_attention

STORED = pytest.mark.parametrize(
    "stored", [torch.float8_e4m3fn, torch.int8], ids=lambda d: str(d)[6:]
)
SIZES = {"num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 8}


@STORED
def test_pages_keep_rows_and_their_scales(device, stored):
    cache = PagedKVCache(num_blocks=6, block_size=4, dtype=stored, device=device, **SIZES)
    cache.allocate("a", 6)
    k, v = torch.randn(2, 6, 3, 8, device=device)
    pages = cache.update(1, k, v, cache.slot_mapping("a"))
    cache.fork("a", "b")
    cache.append("b", 1)  # copies the tail, which "a" shares
    one = torch.ones(1, 3, 8, device=device)
    cache.update(1, one, one, cache.slot_mapping("b", 6))
    within = 2**-4 if stored == torch.float8_e4m3fn else 1 / 127
    for kept, given in zip(cache.get(1, "b"), (k, v), strict=True):
        limit = given.abs().amax(-1, keepdim=True) * within
        assert torch.all((kept[:6] - given).abs() <= limit)
        assert torch.equal(kept[6:], one)
    for x, y in zip(cache.get(1, "a"), cache.get(1, "b"), strict=True):
        assert torch.equal(x, y[:6])
    q = torch.randn(1, 6, 8, device=device)
    lengths, starts = torch.tensor([7]), torch.tensor([0, 1])
    where = (cache.block_table(["b"]), *(x.int().to(device) for x in (lengths, starts)))
    k_pages, v_pages, k_scales, v_scales = pages
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    out, _ = paged_attention(q, k_pages, v_pages, *where, max_seqlen_q=1, **scales)
    k, v = (x.transpose(0, 1)[None] for x in cache.get(1, "b"))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, enable_gqa=True
    )
    torch.testing.assert_close(out, wanted[0].transpose(0, 1))


@STORED
def test_sizes_and_refusals(stored):
    config = KVCacheConfig(max_batch_size=2, max_seq_length=8, dtype=stored, **SIZES)
    cache = PagedKVCache(config, page_size=4)
    assert cache.pages.num_bytes == config.num_bytes == 2 * 2 * 3 * (8 + 4) * 16
    with pytest.raises(ValueError, match="KVCache: dtype must be one without scales, got"):
        KVCache(config)
    with pytest.raises(ValueError, match=r"for_transformers: dtype must be the model's"):
        cache.for_transformers(["a"])
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch\.dtype or int8"):
        KVCacheConfig(dtype=torch.int16)
    with pytest.raises(ValueError, match=r"cache_dtype must be None, .*, got torch.float64"):
        ContinuousBatching(cache_dtype=torch.float64)


@STORED
def test_batches_over_8_bits(device, stored, monkeypatch):
    """Texts stay the model's but where two tokens are nearly as good."""
    monkeypatch.setattr(running_batch, "PAGE_SIZE", PAGE)
    model = tiny_model("llama", device)
    patch(model)
    options = {"num_blocks": 14, "num_host_blocks": 30, "cache_dtype": stored}
    batcher = ContinuousBatching(5, model, **options)
    batcher._batch.scheduler.expected_share = 0.0  # overcommits, so that some go to the host
    pairs = list(zip(PROMPTS, COUNTS, strict=True))
    handles = [batcher.submit(prompt, max_tokens=count) for prompt, count in pairs]
    batcher.run()
    assert batcher._batch._runner.runner.pages.dtype == stored
    assert sum(handle.stats.preemptions for handle in handles) > 0
    assert batcher._batch._host.num_bytes > 0
    for (prompt, count), handle in zip(pairs, handles, strict=True):
        ours, wanted = handle.result().token_ids, alone(model, prompt, count)
        same = next((i for i in range(count) if ours[i] != wanted[i]), None)
        if same is not None:
            logits = model(torch.tensor([prompt + wanted[:same]], device=device)).logits[0, -1]
            gap = logits[wanted[same]] - logits[ours[same]]
            assert gap < 0.1 * logits.std(), (gap, logits.std())
    assert is_free(batcher)
    model.half() if device.type == "cuda" else model.bfloat16()
    batcher.submit(PROMPTS[0], max_tokens=3)
    assert len(batcher.run()[-1].result().token_ids) == 3


@STORED
def test_nan_is_of_the_model_s_dtype_and_not_the_cache_s(device, stored):
    model = tiny_model("llama", device)
    batcher = ContinuousBatching(2, model, cache_dtype=stored, overlap=True)
    with torch.inference_mode(False), torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    handle = batcher.submit(PROMPTS[0], max_tokens=3)
    with pytest.raises(FloatingPointError, match="damaged, or float32 is too narrow"):
        handle.result()
