"""Linear layers over packed codes in Triton: formats, groups, sorted columns, gates, many rows."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from op_checks import assert_refuses
from torch.library import opcheck
from torch.nn import functional

pytest.importorskip("triton")

from llamatelemetry.quantization.groups import pack_groups, unpack_groups
from llamatelemetry.triton_ops import group_gemm
from llamatelemetry.triton_ops.group_gemm import FORMATS, GroupConfig, group_linear

CODES = {"U4": (0, 16, torch.uint8), "S4": (-8, 8, torch.int8), "S8": (-128, 128, torch.int8)}


def packed(n, k, groups, format, device):
    """weight, format, n, scales, zeros of group_linear, and the weights [n, k] in float64."""
    low, high, dtype = CODES[format]
    codes = torch.randint(low, high, (n, k)).to(dtype)
    scales = (torch.rand(n, groups) + 0.5) / k**0.5 / (high - low)
    zeros = torch.randint(16, (n, groups), dtype=torch.uint8) if format == "U4" else None
    weight = pack_groups(codes, format, scales, zeros)
    exact = unpack_groups(weight, n, k).double().to(device)
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    return (weight.packed.to(device), format, n, weight.scales.to(device), zeros), exact


@pytest.mark.without_triton
def test_doctor_names_the_formats():
    from llamatelemetry._native.coverage import TRITON_OPS

    assert TRITON_OPS["quant_linear"] == ", ".join(FORMATS)


@pytest.mark.parametrize("format", ["U4", "S8"])
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"),
    [(1, 16, 32, 1), (3, 70, 256, 8), (17, 33, 384, 3), (70, 40, 128, 2)],
)
def test_group_linear(device, dtype, format, m, n, k, groups):
    args, exact = packed(n, k, groups, format, device)
    x = torch.randn(m, k, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype)
    out = group_linear(x, *args, bias=bias)
    same = (x.float() @ exact.to(dtype).float().t() + bias.float()).to(dtype)
    assert_close(out, same, x.double() @ exact.t() + bias.double())
    assert torch.equal(group_linear(torch.cat([x, x], 1)[:, :k], *args, bias=bias), out)


@pytest.mark.parametrize("m", [5, 70])
@pytest.mark.parametrize("format", ["U4", "S8"])
def test_sorted_columns(device, m, format):
    args, exact = packed(48, 128, 4, format, device)
    perm = torch.randperm(128, device=device, dtype=torch.int32)
    x = torch.randn(m, 128, device=device)
    out, exact = group_linear(x, *args, perm=perm), x[:, perm.long()].double() @ exact.t()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [2, 70])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(device, m, activation):
    args, exact = packed(96, 64, 2, "U4", device)
    x, bias = torch.randn(m, 64, device=device), torch.randn(96, device=device)
    gate, up = (x.double() @ exact.t() + bias.double()).chunk(2, -1)
    by_tanh = functional.gelu(gate, approximate="tanh")
    act = functional.silu(gate) if activation == "silu" else by_tanh
    out = group_linear(x, *args, bias=bias, activation=activation)
    torch.testing.assert_close(out.double(), act * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_parts_of_k(device, splits):
    args, exact = packed(40, 512, 4, "S4", device)
    x = torch.randn(2, 512, device=device)
    out = x.new_empty(2, 40)
    group_gemm.run(x, *args, None, None, None, out, GroupConfig(16, 16, splits, 4, 2))
    torch.testing.assert_close(out.double(), x.double() @ exact.t(), rtol=1e-5, atol=1e-5)


def test_opcheck(device):
    args, _ = packed(32, 64, 2, "U4", device)
    x = torch.randn(2, 3, 64, device=device)
    op = torch.ops.llamatelemetry_triton.group_linear.default
    opcheck(op, (x, *args))
    opcheck(op, (x, *args), {"activation": "silu", "bias": torch.randn(32, device=device)})
    assert group_linear(x[:0], *args).shape == (0, 3, 32)


def test_refuses(device):
    (weight, format, n, scales, zeros), _ = packed(32, 64, 2, "U4", device)
    x = torch.randn(2, 64, device=device)

    def call(x=x, weight=weight, format=format, n=n, scales=scales, zeros=zeros, **more):
        return lambda: group_linear(x, weight, format, n, scales, zeros, **more)

    assert_refuses(call(format="E4M3"), "format", "S8", "'E4M3'")
    assert_refuses(call(n=48), "weight", "[3, 512]", "[2, 512]")
    assert_refuses(call(x=x[:, :48]), "k", "multiple of 32", "48")
    assert_refuses(call(x=x[0, 0]), "x", "k", "[]")
    assert_refuses(call(zeros=None), "zeros", "given for U4", "None")
    assert_refuses(call(scales=scales[:, :, :8]), "scales", "[2, 2, 16]", "[2, 2, 8]")
    assert_refuses(call(scales=scales.repeat(1, 2, 1)), "scales", "multiples of 32", "[2, 4, 16]")
    assert_refuses(call(scales=scales.half()), "scales", "float32", "float16")
    assert_refuses(call(perm=torch.arange(64, device=device)), "perm", "int32", "int64")
    assert_refuses(call(bias=torch.randn(5, device=device)), "bias", "[32]", "[5]")
    assert_refuses(call(activation="relu"), "activation", "'relu'")
