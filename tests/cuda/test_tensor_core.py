"""Tensor cores: switches, figures, products that do not overflow, and AMP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llamatelemetry.cuda import (
    TensorCoreConfig,
    TensorCoreMatMul,
    check_tensor_core_support,
    enable_amp,
    enable_tensor_cores,
    get_tensor_core_info,
    matmul_tensor_core,
    optimize_for_tensor_cores,
)
from llamatelemetry.cuda.tensor_core_figures import FIGURES, figures_for

pytestmark = pytest.mark.filterwarnings("ignore:enable_(amp|tensor_cores):")
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine with one GPU of a given name and capability, for what only asks about it."""

    def pretend(name, capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)

    return pretend


def test_support(a_gpu):
    a_gpu("Tesla T4", (7, 5))
    assert check_tensor_core_support(0)
    assert check_tensor_core_support(torch.device("cuda"))
    assert not check_tensor_core_support(1)
    assert not check_tensor_core_support(torch.device("cpu"))
    a_gpu("Tesla P100-PCIE-16GB", (6, 0))
    assert not check_tensor_core_support()


def test_without_cuda_nothing_is_supported(no_cuda):
    assert check_tensor_core_support() is False
    info = get_tensor_core_info()
    assert info["supported"] is False
    assert "no CUDA device" in info["reason"]
    assert (info["fp16_tflops"], info["int8_tops"], info["estimated_speedup"]) == (0.0, 0.0, 1.0)
    with pytest.warns(UserWarning, match="enable_tensor_cores: there is no CUDA device"):
        assert enable_tensor_cores().enabled is False
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="optimize_for_tensor_cores: .*stays as it is"):
        assert optimize_for_tensor_cores(model) is model
    assert model.weight.dtype == torch.float32
    assert model.training


@pytest.mark.parametrize("allow", [True, False])
def test_switches_are_set_and_unset(allow):
    """They were only ever set."""
    matmul = torch.backends.cuda.matmul
    config = enable_tensor_cores(torch.bfloat16, allow_tf32=allow)
    assert isinstance(config, TensorCoreConfig)
    assert (config.dtype, config.allow_tf32) == (torch.bfloat16, allow)
    assert matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allow
    TensorCoreConfig(allow_fp16=allow).apply()
    assert matmul.allow_fp16_reduced_precision_reduction is allow
    TensorCoreConfig(dtype=torch.bfloat16, allow_fp16=allow).apply()
    assert matmul.allow_bf16_reduced_precision_reduction is allow


@pytest.mark.parametrize(
    ("name", "capability", "architecture", "fp16", "int8"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), "Volta", 125, 62.8),
        ("Tesla T4", (7, 5), "Turing", 65, 130),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "Ampere", 312, 624),
        ("NVIDIA GeForce RTX 3090", (8, 6), "Ampere", 71, 284),
        ("NVIDIA RTX A5000", (8, 6), "Ampere", 125, 250),
        ("NVIDIA L4", (8, 9), "Ada Lovelace", 121, 242),
        ("NVIDIA L40S", (8, 9), "Ada Lovelace", 362, 733),
        ("NVIDIA H200", (9, 0), "Hopper", 989.4, 1978.9),
        ("NVIDIA B300 SXM6", (10, 3), "Blackwell", 2250, 4500),
        ("NVIDIA GeForce RTX 5090", (12, 0), "Blackwell", 209.5, 838),
    ],
)
def test_info(a_gpu, name, capability, architecture, fp16, int8):
    a_gpu(name, capability)
    info = get_tensor_core_info()
    assert info["device"] == name
    assert info["compute_capability"] == f"{capability[0]}.{capability[1]}"
    assert info["supported"] is True
    assert (info["architecture"], info["fp16_tflops"], info["int8_tops"]) == (
        architecture,
        fp16,
        int8,
    )
    assert 2 <= info["estimated_speedup"] < 40
    assert info["source"]
    assert "reason" not in info


def test_info_of_what_is_not_supported_or_not_known(a_gpu):
    a_gpu("Tesla P100-PCIE-16GB", (6, 0))
    assert "need compute capability 7.0, got 6.0" in get_tensor_core_info()["reason"]
    a_gpu("Next", (13, 0))
    assert get_tensor_core_info()["supported"] is True
    assert "no figures are known for Next" in get_tensor_core_info()["reason"]


def test_table_of_figures():
    for row in FIGURES:
        assert figures_for(row.card, row.capability) is row
        assert row.source
        assert row.fp16_tflops > row.fp32_tflops
    capabilities = {row.capability for row in FIGURES}
    assert {(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)} <= capabilities


@HALVES
def test_matmul(device, dtype, half):
    a, b = torch.randn(17, 40, device=device).to(dtype), torch.randn(40, 9, device=device).to(dtype)
    out = matmul_tensor_core(a, b, dtype=half)
    exact = a.to(half).double() @ b.to(half).double()
    assert out.dtype == dtype
    rounding = max(torch.finfo(half).eps if dtype == half else 0, torch.finfo(dtype).eps)
    assert (out.double() - exact).abs().max() <= 2 * rounding * exact.abs().max()
    assert torch.equal(TensorCoreMatMul(half)(a, b), out)


@pytest.mark.parametrize(
    ("a", "b"), [((4, 3, 5), (4, 5, 2)), ((2, 1, 3, 5), (4, 5, 2)), ((4, 3, 5), (5, 2))]
)
def test_matmul_batched(device, a, b):
    x, y = torch.randn(a, device=device), torch.randn(b, device=device)
    torch.testing.assert_close(matmul_tensor_core(x, y), x @ y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [((0, 5), (5, 2)), ((3, 0), (0, 2)), ((3, 5), (5, 0))])
def test_matmul_of_nothing(device, shape):
    a, b = (torch.ones(s, device=device) for s in shape)
    assert torch.equal(matmul_tensor_core(a, b), a @ b)


@pytest.mark.parametrize("size", [1e5, 1e9, 1e30])
def test_values_beyond_float16_do_not_become_inf(device, size):
    a, b = torch.randn(6, 32, device=device), torch.randn(32, 5, device=device)
    big_a, big_b = a.clone(), b.clone()
    big_a[2] *= size
    big_b[:, 3] *= 1e5
    plain = matmul_tensor_core(a, b)
    out = matmul_tensor_core(big_a, big_b)
    assert out.isfinite().all()
    rounding = 2**-10 * (big_a.double().abs() @ big_b.double().abs())
    assert ((out.double() - big_a.double() @ big_b.double()).abs() <= rounding).all()
    rows, columns = [0, 1, 3, 4, 5], [0, 1, 2, 4]
    assert torch.equal(out[rows][:, columns], plain[rows][:, columns])  # the others stay as exact


def test_sums_beyond_float16_do_not_become_inf(device):
    a, b = torch.full((2, 4096), 200.0, device=device), torch.full((4096, 2), 100.0, device=device)
    assert torch.equal(matmul_tensor_core(a, b), torch.full_like(a[:, :2], 200.0 * 100 * 4096))


def test_inf_and_nan_stay_where_they_are(device):
    a, b = torch.ones(4, 3, device=device), torch.ones(3, 2, device=device)
    a[1, 0], a[2, 1] = torch.inf, torch.nan
    out = matmul_tensor_core(a, b)
    assert out[:, 0].isfinite().tolist() == [True, False, False, True]
    assert out[1].isinf().all()
    assert out[2].isnan().all()


def test_out_is_written_and_returned(device):
    a, b = torch.randn(3, 4, device=device), torch.randn(4, 5, device=device)
    out = torch.full((5, 3), torch.nan, device=device).t()
    assert matmul_tensor_core(a, b, out=out) is out
    assert torch.equal(out, matmul_tensor_core(a, b))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda a, b: matmul_tensor_core(a, b, dtype=torch.int8), ("dtype must", "int8")),
        (lambda a, b: matmul_tensor_core(a.long(), b), ("A must be floating", "int64")),
        (lambda a, b: matmul_tensor_core(a, b[0]), ("B must have at least two", "[5]")),
        (lambda a, b: matmul_tensor_core(a, a), ("B must have 4 rows", "[3, 4]")),
        (lambda a, b: matmul_tensor_core(a, b, a), ("out must have shape [3, 5]", "[3, 4]")),
        (lambda a, b: matmul_tensor_core(a, b, (a @ b).half()), ("out must have dtype", "16")),
    ],
)
def test_matmul_refusals(device, call, parts):
    a, b = torch.ones(3, 4, device=device), torch.ones(4, 5, device=device)
    with pytest.raises(RuntimeError) as caught:
        call(a, b)
    assert all(part in str(caught.value) for part in ("matmul_tensor_core: ", *parts))


def test_matmul_has_gradients(device):
    with torch.inference_mode(False):
        a, b = (torch.randn(4, 4, device=device, requires_grad=True) for _ in range(2))
        matmul_tensor_core(a * 1e5, b).sum().backward()
        torch.testing.assert_close(
            a.grad, 1e5 * b.sum(1).expand(4, 4).detach(), rtol=2e-2, atol=1e3
        )


def test_matmul_replays_in_a_graph(device):
    from llamatelemetry.cuda import CUDAGraph

    a, b = torch.randn(8, 16, device=device), torch.randn(16, 8, device=device)
    matmul_tensor_core(a, b)
    graph = CUDAGraph()
    with pytest.warns() if device.type == "cpu" else torch.no_grad():
        graph.capture(lambda a: matmul_tensor_core(a, b), {"a": a})
    big = torch.randn(8, 16, device=device) * 1e6
    torch.testing.assert_close(graph.replay(a=big), matmul_tensor_core(big, b), rtol=0, atol=0)


@HALVES
def test_amp_trains(device, half, request):
    """Without CUDA it gave None, None, and the documented loop crashed."""
    if device.type == "cpu":
        request.getfixturevalue("no_cuda")
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)).to(device)
        x = torch.randn(64, 8, device=device)
        y = x[:, :1] * x[:, 1:2]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scaler, autocast = enable_amp(half)
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            with autocast:
                out = model(x)
                loss = nn.functional.mse_loss(out.float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert out.dtype == (half if device.type == "cuda" else torch.bfloat16)
    assert losses[-1] < 0.5 * losses[0]
    assert scaler.is_enabled() is (device.type == "cuda" and half == torch.float16)


def test_amp_on_the_cpu_says_so(no_cuda):
    with pytest.warns(UserWarning, match="enable_amp: there is no CUDA device"):
        scaler, autocast = enable_amp(cache_enabled=False)
    assert not scaler.is_enabled()
    assert autocast.device == "cpu"
    assert autocast._cache_enabled is False
