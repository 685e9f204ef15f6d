"""What goes wrong is said by name, and the object serves as before afterwards."""

from __future__ import annotations

import pytest
import torch
from engines import PROMPTS, all_free, make_engine, rows_of

from llamatelemetry.cuda import (
    CUDAGraph,
    GraphPool,
    enable_cuda_graphs,
    matmul_tensor_core,
    triton_add,
    triton_layernorm,
    triton_softmax,
)
from llamatelemetry.inference import (
    KVCache,
    KVCacheConfig,
    PagedKVCache,
    Recording,
    flash_attention_forward,
)
from llamatelemetry.inference.runner import StepRunner
from llamatelemetry.ops import silu_and_mul

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no CUDA device", "ignore:triton_.*torch's own op runs"
)
SIZES = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "dtype": torch.float32}


def qkv(device, dtype=torch.float32):
    return [torch.randn(1, 6, 2, 8, device=device, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda k: k.half(), "key must have query's dtype .* got torch.float16.* cast it"),
        (lambda k: k.to("meta"), "key must have query's dtype and device .* got .* meta"),
        (lambda k: k[..., :4], "key must have query's batch and head_dim"),
        (lambda k: k[0], r"key must be \[batch, seqlen, num_heads, head_dim\]"),
        (lambda k: torch.cat([k, k, k], 2), "key's heads must divide query's 2, got 6"),
    ],
    ids=["dtype", "device", "width", "dims", "heads"],
)
def test_flash_attention(change, named, device):
    q, k, v = qkv(device)
    with pytest.raises(ValueError, match=named):
        flash_attention_forward(q, change(k), change(v))
    with pytest.raises(ValueError, match="query must be a floating-point tensor"):
        flash_attention_forward(*(x.int() for x in (q, k, v)))
    assert flash_attention_forward(q, k, v).isfinite().all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x.half(), "k must be torch.float32 on .* got torch.float16"),
        (lambda x: x.to("meta"), "k must be torch.float32 on .* got torch.float32 on meta"),
        (lambda x: x[..., :4], r"k must be \[batch, seqlen, 2, 8\]"),
        (lambda x: x.expand(5, -1, -1, -1), "batch must be 1, got 5"),
    ],
    ids=["dtype", "device", "shape", "batch"],
)
def test_kv_cache(change, named, device):
    cache = KVCache(KVCacheConfig(max_batch_size=2, max_seq_length=8, device=device, **SIZES))
    _, k, v = qkv(device)
    cache.update(0, k, v)
    with pytest.raises(ValueError, match=f"KVCache.update: {named}"):
        cache.update(0, change(k), change(v))
    with pytest.raises(RuntimeError, match="max_seq_length = 8, got 6 \\+ 6 tokens"):
        cache.update(0, k, v)
    assert torch.equal(cache.get(0)[0], k)
    cache.clear()
    assert torch.equal(cache.update(0, k, v)[1], v)


def test_paged_cache_out_of_memory_and_after_free(device):
    cache = PagedKVCache(num_blocks=3, block_size=4, device=device, **SIZES)
    cache.allocate("a", range(6))
    for call in (lambda: cache.append("a", 7), lambda: cache.allocate("b", range(20, 26))):
        with pytest.raises(RuntimeError, match="Out of KV cache memory: 2 more blocks"):
            call()
        cache.check()
    assert cache.length("a") == 6
    cache.append("a", 6)
    cache.free("a")
    for call in (lambda: cache.append("a"), lambda: cache.free("a"), lambda: cache.get(0, "a")):
        with pytest.raises(ValueError, match="sequence must be allocated first, got 'a'"):
            call()
    cache.check()
    assert cache.allocate("a", 12) == 0


class Broken(Exception):
    """What a user's function raises."""


@pytest.mark.parametrize("how", ["function", "block", "pool"])
def test_exception_while_capturing(how, device):
    if how == "block" and device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("with CUDA a captured block works on the GPU")
    graph, pool = CUDAGraph(), GraphPool()
    x = torch.ones(4, device=device)

    def fail(x):
        x + 1
        raise Broken

    def block():
        with graph.capture():
            fail(x)

    calls = {
        "function": lambda: graph.capture(fail, {"x": x}),
        "block": block,
        "pool": lambda: pool.capture("one", fail, {"x": x}),
    }
    with pytest.raises(Broken):
        calls[how]()
    assert pool.list_graphs() == []
    assert not graph.is_captured()
    with pytest.raises(RuntimeError, match="Graph not captured yet"):
        graph.replay()
    assert graph.capture(lambda x: x * 2, {"x": x}).tolist() == [2.0] * 4
    pool.capture("one", lambda x: x * 3, {"x": x})
    assert pool.replay("one", x=torch.full_like(x, 2)).tolist() == [6.0] * 4


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (lambda x: x[:2], r"input x must have the shape \(4,\)"),
        (lambda x: x.half(), "input x must have the dtype torch.float32"),
        (lambda x: 3.0, "input x must stay what it was"),
    ],
    ids=["shape", "dtype", "type"],
)
def test_inputs_of_a_replay(bad, named, device):
    x = torch.ones(4, device=device)
    graph = CUDAGraph()
    graph.capture(lambda x: x * 2, {"x": x})
    with pytest.raises(ValueError, match=named):
        graph.replay(x=bad(x))
    with pytest.raises(KeyError, match="input must be one of"):
        graph.replay(y=x)
    assert graph.replay(x=torch.full_like(x, 3)).tolist() == [6.0] * 4


def test_exception_in_a_model_with_graphs(device):
    class Sometimes(torch.nn.Module):
        def forward(self, x):
            if x.shape[0] == 3:
                raise Broken
            return x * 2

    model = enable_cuda_graphs(Sometimes().eval())
    for _ in range(2):
        with pytest.raises(Broken):
            model(torch.ones(3, device=device))
        assert model(torch.ones(4, device=device)).tolist() == [2.0] * 4


def test_triton_functions_and_products(device):
    x, narrow = torch.ones(3, 8, device=device), torch.ones(7, device=device)
    meta = torch.ones(3, 8, device="meta")
    refused = {
        "y must be on the device of x": lambda: triton_add(x, meta),
        r"weight must have the shape \[width\] = \[8\]": lambda: triton_layernorm(x, narrow),
        "x must be one of float16": lambda: triton_softmax(x.int()),
        "y must be a tensor, got float": lambda: triton_add(x, 1.0),
        "A must be a tensor, got list": lambda: matmul_tensor_core([[1.0]], x),
        "A must be floating point": lambda: matmul_tensor_core(x.int(), x.mT),
        "out must have dtype torch.float32": lambda: matmul_tensor_core(
            x, x.mT, out=torch.ones(3, 3, device=device, dtype=torch.float64)
        ),
        "out must have shape": lambda: matmul_tensor_core(x, x.mT, out=torch.ones_like(x)),
    }
    for named, call in refused.items():
        with pytest.raises(RuntimeError, match=named):
            call()
    with pytest.raises(IndexError, match="dim must be a dimension of x"):
        triton_softmax(x, dim=2)
    # Mixed dtypes are promoted, as in torch.
    assert triton_add(x, x.half()).dtype == torch.float32
    assert matmul_tensor_core(x, x.mT.half()).dtype == torch.float32


def test_engine(tmp_path, device, monkeypatch):
    """Refused input comes back as a sentence; out of memory comes through; both leave it whole."""
    engine, _ = make_engine(tmp_path, device)
    want = rows_of(engine, PROMPTS)
    for bad in ({"prompt": ""}, {"max_tokens": 0}, {"temperature": -1.0}, {"max_tokens": 10**9}):
        result = engine.infer(**{"prompt": [5, 9, 2], "max_tokens": 4} | bad)
        assert not result.success
        assert result.error_message

    def ready(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as limited:
        limited.setattr(StepRunner, "ready", ready)
        with pytest.raises(torch.OutOfMemoryError):
            rows_of(engine, PROMPTS)
    assert rows_of(engine, PROMPTS) == want
    assert all_free(engine)


def test_closed_recording():
    x = torch.randn(2, 16)
    recording = Recording()
    with recording:
        y = silu_and_mul(x)
    recording.replay()
    recording.close()
    with pytest.raises(RuntimeError, match="nothing is recorded yet, or it was closed"):
        recording.replay()
    with recording:
        y = silu_and_mul(x)
    x.zero_()
    recording.replay()
    assert not y.any()
