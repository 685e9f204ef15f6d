"""The guide's sections on CUDA graphs, Triton and tensor cores: code as a user writes it from the
public signatures, with results that are those of plain torch, on the CPU and on a GPU."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from families import VOCAB, tiny_model
from torch import nn
from torch.nn import functional as F

from llamatelemetry.cuda import (
    TRITON_AVAILABLE,
    CUDAGraph,
    GraphCaptureConfig,
    GraphPool,
    KernelConfig,
    TensorCoreMatMul,
    capture_graph,
    check_tensor_core_support,
    disable_cuda_graphs,
    enable_amp,
    enable_cuda_graphs,
    enable_tensor_cores,
    get_kernel,
    get_tensor_core_info,
    list_kernels,
    matmul_tensor_core,
    optimize_for_tensor_cores,
    register_kernel,
    replay_graph,
    triton_add,
    triton_layernorm,
    triton_registry,
    triton_softmax,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no CUDA device", "ignore:triton_.*torch's own op runs"
)
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _switches():
    """torch's switches, and the registry of kernels, are after each test as before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    kernels = dict(triton_registry._registry)
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
    triton_registry._registry.clear()
    triton_registry._registry.update(kernels)


def layers(device, dtype=torch.float32):
    with torch.inference_mode(False):
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        return model.eval().to(device, dtype).requires_grad_(False)


# CUDA graphs


def test_graph_as_a_context_manager(device):
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("with CUDA a captured block works on the GPU")
    model, x = layers(device), torch.randn(8, 64, device=device)
    model(x)  # a warm-up: libraries set themselves up outside of the capture
    graph = CUDAGraph(GraphCaptureConfig(warmup_iters=3))
    with graph.capture():
        y = model(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        close(y, model(x))
    assert graph.is_captured() is (device.type == "cuda")


def test_graph_of_a_function(device):
    model = layers(device)
    x = torch.randn(8, 64, device=device)
    graph = CUDAGraph()
    with pytest.raises(RuntimeError, match="Graph not captured yet"):
        graph.replay()
    first = graph.capture(lambda x: {"y": model(x)}, inputs={"x": x})
    close(first["y"], model(x))
    new = torch.randn(8, 64, device=device)
    close(graph.replay(x=new)["y"], model(new))

    simple = capture_graph(lambda x: model(x), {"x": x}, warmup_iters=2)
    close(replay_graph(simple), model(x))
    graph.reset()
    assert not graph.is_captured()


def test_graph_pool(device):
    model, pool = layers(device), GraphPool()
    for batch in (1, 4, 16):
        x = torch.randn(batch, 64, device=device)
        assert pool.capture(f"batch_{batch}", lambda x: model(x), {"x": x}) == f"batch_{batch}"
    x = torch.randn(4, 64, device=device)
    close(pool.replay("batch_4", x=x), model(x))
    assert pool.list_graphs() == ["batch_1", "batch_4", "batch_16"]
    pool.remove("batch_4")
    assert pool.get("batch_4") is None
    with pytest.raises(KeyError, match="batch_4"):
        pool.replay("batch_4")
    pool.clear()
    assert pool.list_graphs() == []


def test_graphs_of_a_model(device):
    model = tiny_model("llama", device)
    plain = copy.deepcopy(model)
    enable_cuda_graphs(model)
    for length in (5, 9, 5):
        ids = torch.randint(VOCAB, (2, length), device=device)
        logits = model(ids, use_cache=False).logits
        close(logits, plain(ids, use_cache=False).logits, rtol=0, atol=1e-5)
    disable_cuda_graphs(model)
    assert "forward" not in model.__dict__


# Triton kernels


def test_triton_functions(device):
    x, y = torch.randn(2, 64, 768, device=device) + 3
    weight, bias = torch.randn(2, 768, device=device)
    close(triton_add(x, y), x + y)
    close(triton_softmax(x, dim=-1), torch.softmax(x, -1))
    want = F.layer_norm(x, (768,), weight, bias, 1e-5)
    close(triton_layernorm(x, weight, bias, eps=1e-5), want, rtol=1e-5, atol=1e-5)
    assert list_kernels() == ["add", "layernorm", "softmax"]
    assert get_kernel("softmax").name == "softmax"


@pytest.mark.skipif(not TRITON_AVAILABLE, reason="needs Triton")
def test_triton_kernel_of_ones_own(device):
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton runs on the CPU with TRITON_INTERPRET=1 alone")
    from guide_kernel import double_kernel

    register_kernel("double", double_kernel, KernelConfig("double", block_size=256))
    x = torch.randn(1000, device=device)
    out = torch.empty_like(x)
    get_kernel("double").launch(x, out, x.numel())
    close(out, 2 * x)


# Tensor cores and AMP


def test_tensor_cores(device):
    config = enable_tensor_cores(dtype=torch.float16, allow_tf32=True)
    info = get_tensor_core_info()
    assert config.enabled is check_tensor_core_support() is info["supported"]
    a, b = torch.randn(64, 96, device=device), torch.randn(96, 32, device=device)
    want = (a.half().double() @ b.half().double()).float()
    close(matmul_tensor_core(a, b, dtype=torch.float16), want, rtol=1e-3, atol=1e-3)
    close(TensorCoreMatMul(dtype=torch.float16)(a, b), want, rtol=1e-3, atol=1e-3)
    out = torch.empty(64, 32, device=device)
    assert matmul_tensor_core(a, b, out=out) is out
    close(out, want, rtol=1e-3, atol=1e-3)


def test_model_for_tensor_cores(device):
    model = tiny_model("llama")
    ids = torch.randint(VOCAB, (1, 8))
    before = model(ids).logits
    if device.type == "cpu":
        if torch.cuda.is_available():
            pytest.skip("with CUDA the model moves to the GPU")
        assert optimize_for_tensor_cores(model) is model
        close(model(ids).logits, before, rtol=0, atol=0)
        return
    optimize_for_tensor_cores(model, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    after = model(ids.to(device)).logits
    close(after.float().cpu(), before, rtol=0.05, atol=0.05 * before.abs().max().item())


@torch.inference_mode(False)
@torch.enable_grad()
def test_training_with_amp(device):
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("with CUDA enable_amp trains on the GPU")
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler, autocast = enable_amp(dtype=torch.float16)
    x = torch.randn(256, 16, device=device)
    target = x[:, :4].sum(1, keepdim=True)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        with autocast:
            loss = F.mse_loss(model(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
