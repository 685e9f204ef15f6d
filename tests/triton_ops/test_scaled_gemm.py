"""Linear layers of e4m3 in Triton."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from op_checks import assert_refuses
from torch.library import opcheck

pytest.importorskip("triton")

from llamatelemetry.ops import reference
from llamatelemetry.triton_ops.scaled_gemm import scaled_linear


@pytest.fixture(autouse=True)
def _has_e4m3(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with e4m3")


def quantised(rows, k, device):
    x = torch.randn(rows, k, device=device)
    scales = x.abs().amax(1, keepdim=True) / 448
    return (x / scales).to(torch.float8_e4m3fn), scales


def arguments(m, n, k, device):
    return *quantised(m, k, device), *quantised(n, k, device)


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
