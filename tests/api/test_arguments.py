"""What is no model, tensor, config or count is refused where it is given, by name."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry import InferenceEngine, patch
from llamatelemetry.cuda import (
    CUDAGraph,
    GraphCaptureConfig,
    TensorCoreMatMul,
    disable_cuda_graphs,
    enable_amp,
    enable_cuda_graphs,
    enable_tensor_cores,
    optimize_for_tensor_cores,
    replay_graph,
)
from llamatelemetry.inference import (
    BatchInferenceOptimizer,
    ContinuousBatching,
    KVCache,
    KVCacheConfig,
    PagedKVCache,
    SpeculativeDecoder,
    disable_flash_attention,
    enable_flash_attention,
    get_optimal_context_length,
    kv_cache_bytes,
    optimize_kv_cache,
    restore_kv_cache,
    search_batch_size,
)
from llamatelemetry.ops import rms_norm

SIZES = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "dtype": torch.float32}
TWO_LAYERS = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: patch("smollm2"), "model must be a transformers model, got str"),
        (lambda: enable_flash_attention("smollm2"), "model must be a module, got str"),
        (lambda: InferenceEngine("smollm2"), "must be what load_model returned, got str"),
        (lambda: SpeculativeDecoder("smollm2"), "must be transformers models, got str"),
        (
            lambda: ContinuousBatching(8, "smollm2"),
            "an InferenceEngine or .* got str",
        ),
        (lambda: ContinuousBatching(TWO_LAYERS, 4), "must be a whole number, got Sequential$"),
        (lambda: KVCache(None), "config must be a KVCacheConfig, got NoneType"),
        (lambda: BatchInferenceOptimizer().batch_infer(["a"], None), "must be callable, got None"),
        (lambda: ContinuousBatching(None), "max_batch_size must be a whole number, got None"),
        (lambda: enable_cuda_graphs("smollm2"), "model must be a module, got str"),
        (lambda: disable_cuda_graphs("smollm2"), "model must be a module, got str"),
        (lambda: disable_flash_attention("smollm2"), "model must be a module, got str"),
        (lambda: restore_kv_cache("smollm2"), "model must be a module, got str"),
        (lambda: optimize_kv_cache("smollm2"), "a transformers model .* got str"),
        (lambda: optimize_for_tensor_cores("smollm2"), "model must be a module, got str"),
        (lambda: search_batch_size("smollm2", len), "model must be a module, got str"),
        (lambda: replay_graph("first"), "graph must be a CUDAGraph, got str"),
        (lambda: CUDAGraph("first"), "config must be a GraphCaptureConfig, got str"),
        (lambda: PagedKVCache("first"), "config must be a KVCacheConfig, got str"),
        (lambda: BatchInferenceOptimizer("first"), "config must be a BatchConfig, got str"),
        (lambda: get_optimal_context_length("7B", 16.0), "model_size_b must be a number, got '7B'"),
    ],
)
def test_a_name_is_no_object(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: GraphCaptureConfig(capture_error_mode="local"), "capture_error_mode must be one"),
        (lambda: GraphCaptureConfig(warmup_iters=-1), "warmup_iters must be at least 0, got -1"),
        (lambda: KVCacheConfig(dtype="float16"), "dtype must be a floating-point torch.dtype"),
        (lambda: KVCacheConfig(dtype=torch.int32), "dtype must be a floating-point torch.dtype"),
        (lambda: kv_cache_bytes(-1, 8, 128, 64, torch.float16), "num_layers must be at least 0"),
        (lambda: enable_tensor_cores(torch.int8), "dtype must be one of float16, .* torch.int8"),
        (lambda: TensorCoreMatMul(torch.int8), "dtype must be one of float16, .* got torch.int8"),
        (lambda: enable_amp(torch.float32), "dtype must be one of float16, bfloat16, got"),
    ],
)
def test_settings_are_checked_where_they_are_given(call, named):
    with pytest.raises((ValueError, RuntimeError), match=named):
        call()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: CUDAGraph().capture(3), "func must be callable, got int"),
        (lambda: CUDAGraph().capture(torch.relu, [torch.ones(2)]), "inputs must be a dict .* list"),
    ],
)
def test_what_cannot_be_captured(call, named):
    with pytest.raises(TypeError, match=named):
        call()


def test_a_layer_that_a_cache_does_not_have():
    cache = KVCache(KVCacheConfig(max_batch_size=1, max_seq_length=8, **SIZES))
    pages = PagedKVCache(num_blocks=2, block_size=4, **SIZES)
    pages.allocate("a", 3)
    k = torch.zeros(3, 2, 8)
    for call in (
        lambda: cache.get(1),
        lambda: cache.get(-1),
        lambda: cache.length(1),
        lambda: cache.update(1, k[None], k[None]),
        lambda: pages.update(1, k, k, pages.slot_mapping("a")),
        lambda: pages.get(1, "a"),
    ):
        with pytest.raises(ValueError, match=r"layer_idx must lie in \[0, 1\), got -?1"):
            call()
    with pytest.raises(ValueError, match=r"begin must lie in \[0, 3\], got 4"):
        pages.slot_mapping("a", 4)


def test_a_list_is_no_tensor():
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor' for argument 'x'"):
        rms_norm([1.0, 2.0], torch.ones(2), 1e-5)
