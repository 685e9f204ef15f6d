"""Linear layers of int8 and e4m3 in Triton."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from op_checks import assert_refuses
from torch.library import opcheck

pytest.importorskip("triton")

from llamatelemetry.ops import reference
from llamatelemetry.triton_ops import gemm
from llamatelemetry.triton_ops.launch import has_tma
from llamatelemetry.triton_ops.scaled_gemm import scaled_linear
from llamatelemetry.triton_ops.tuning import LinearConfig


@pytest.fixture(autouse=True)
def _has_e4m3(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with e4m3")


def arguments(m, n, k, device, kind=torch.float8_e4m3fn):
    return *quantised(m, k, device, kind), *quantised(n, k, device, kind)


def quantised(rows, k, device, kind):
    return reference.quantize_rows(torch.randn(rows, k, device=device), kind)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 32), (3, 70, 272), (40, 33, 128), (300, 64, 256)]
)
def test_scaled_linear(device, dtype, m, n, k):
    args = arguments(m, n, k, device)
    bias = torch.randn(n, device=device).to(dtype)
    out = scaled_linear(*args, dtype, bias)
    expected = reference.scaled_linear(*args, torch.float32, bias.float())
    exact = (args[0].double() * args[1].double()) @ (args[2].double() * args[3].double()).t()
    exact = exact + bias.double()
    if dtype == torch.float32:
        # Tensor cores keep 14 bits of a sum, and cut off at each step of k.
        limit = 2**-10 if device.type == "cuda" else 2**-18
        assert (out - expected).abs().max() <= limit * exact.abs().max()
    else:
        assert_close(out, expected.to(dtype), exact)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (3, 70, 272), (300, 64, 256)])
def test_int8(device, dtype, m, n, k):
    args = arguments(m, n, k, device, torch.int8)
    bias = torch.randn(n, device=device).to(dtype)
    out, expected = (f(*args, dtype, bias) for f in (scaled_linear, reference.scaled_linear))
    exact = (args[0].double() * args[1].double()) @ (args[2].double() * args[3].double()).t()
    assert_close(out, expected, exact + bias.double())


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (3, 200, 272), (300, 64, 256)])
def test_blocks(device, m, n, k):
    x, x_scales = reference.quantize_rows(
        torch.randn(m, k, device=device), torch.float8_e4m3fn, 128
    )
    weight = (torch.randn(n, k, device=device) * 100).to(torch.float8_e4m3fn)
    weight_scales = torch.rand(-(-n // 128), -(-k // 128), device=device)
    args = (x, x_scales, weight, weight_scales, torch.float32, torch.randn(n, device=device), 128)
    out, expected = scaled_linear(*args), reference.scaled_linear(*args)
    limit = 2**-10 if device.type == "cuda" else 2**-18
    assert (out - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize(("kind", "block"), [(torch.int8, 0), (torch.float8_e4m3fn, 128)])
def test_descriptors_and_parts_of_k(device, kind, block):
    """Every way that a config may choose gives the same."""
    if device.type == "cuda" and not has_tma(device):
        pytest.skip("needs a GPU with descriptors")
    x, x_scales = reference.quantize_rows(torch.randn(40, 512, device=device), kind, block or None)
    weight, scales = reference.quantize_rows(torch.randn(96, 512, device=device), kind)
    if block:
        scales = torch.rand(1, 4, device=device)
    results = []
    for config in (
        LinearConfig(64, 32, 128, 1, 2, 4, 2),
        LinearConfig(64, 32, 128, 2, 2, 4, 2),
        LinearConfig(64, 32, 128, 1, 2, 4, 2, tma=True),
        LinearConfig(64, 32, 128, 1, 2, 4, 2, tma=True, stream=5),
    ):
        out = torch.empty(40, 96, device=device)
        gemm.run(x, weight, None, None, out, config, (x_scales, scales), block)
        results.append(out)
    # Tensor cores add products of e4m3 up in fewer bits than float32 has, tile by tile.
    short = device.type == "cuda" and kind == torch.float8_e4m3fn
    limit = (2**-10 if short else 2**-18) * results[0].abs().max()
    for other in results[1:]:
        assert (other - results[0]).abs().max() <= limit


def test_opcheck(device):
    args = arguments(4, 32, 64, device)
    op = torch.ops.llamatelemetry_triton.scaled_linear.default
    opcheck(
        op, (*args, torch.bfloat16), test_utils=("test_faketensor", "test_autograd_registration")
    )
    x, scales, *weight = args
    shaped = scaled_linear(x.view(2, 2, 64), scales.view(2, 2, 1), *weight, torch.float16)
    assert torch.equal(shaped.flatten(0, 1), scaled_linear(*args, torch.float16))
    assert scaled_linear(x[:0], scales[:0], *weight, torch.float16).shape == (0, 32)


def test_refuses(device):
    x, x_scales, weight, weight_scales = arguments(4, 32, 64, device)
    run, half = scaled_linear, torch.float16
    assert_refuses(lambda: run(x, x_scales, weight, weight_scales, torch.int8), "dtype", "int8")
    assert_refuses(lambda: run(x.float(), x_scales, weight, weight_scales, half), "x", "float32")
    assert_refuses(lambda: run(x, x_scales[:3], weight, weight_scales, half), "x_scales", "4", "3")
    assert_refuses(lambda: run(x[:, :40], x_scales, weight, weight_scales, half), "k", "16", "40")
    none = lambda: run(x[:, :0], x_scales, weight[:, :0], weight_scales, half)  # noqa: E731
    assert_refuses(none, "k", "16", "0")
    assert_refuses(lambda: run(x[0, 0], x_scales, weight, weight_scales, half), "x", "k", "[]")
    assert_refuses(lambda: run(x, x_scales, weight[0, 0], weight_scales, half), "weight", "[]")
    assert_refuses(
        lambda: run(x, x_scales, weight, weight_scales, half, weight_scales[:5, 0].half()),
        *("bias", "[32]", "[5]"),
    )
    in_blocks = lambda *args: run(*args, half, None, 128)  # noqa: E731
    assert_refuses(lambda: in_blocks(x, x_scales[:3], weight, weight_scales), "x_scales", "[4, 1]")
    int8 = arguments(4, 32, 64, device, torch.int8)
    assert_refuses(lambda: in_blocks(*int8), "block must be None, or 128 of e4m3", "int8")
