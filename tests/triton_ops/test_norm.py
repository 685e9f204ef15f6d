"""Norms and gated activations in Triton against ours in plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from closeness import assert_close
from op_checks import assert_refuses
from torch.library import opcheck
from torch.nn import functional

pytest.importorskip("triton")

from llamatelemetry import ops as native
from llamatelemetry.ops import reference
from llamatelemetry.triton_ops import norm, quantize

WIDTHS = [1, 3, 96, 127, 1000]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(device, dtype, width, offset):
    x = torch.randn(3, 2, width, device=device).to(dtype) * 3
    weight = torch.rand(width, device=device).to(dtype)
    out = norm.rms_norm(x, weight, 1e-6, offset)
    exact = reference.rms_norm(x.double(), weight.double(), 1e-6, offset)
    assert_close(out, reference.rms_norm(x, weight, 1e-6, offset), exact)


def test_rms_norm_of_heads_that_lie_apart(device, dtype):
    rows = torch.randn(4, 6, 32, device=device).to(dtype)[:, 1:3]
    weight = torch.rand(32, device=device).to(dtype)
    assert torch.equal(
        norm.rms_norm(rows, weight, 1e-6), norm.rms_norm(rows.contiguous(), weight, 1e-6)
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_fused_add_rms_norm(device, dtype, width):
    x, residual = (torch.randn(5, width, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(width, device=device).to(dtype)
    total = (x.float() + residual.float()).to(dtype)
    exact = reference.rms_norm(total.double(), weight.double(), 1e-6)
    theirs = reference.rms_norm(total, weight, 1e-6)
    norm.fused_add_rms_norm_(x, residual, weight, 1e-6)
    assert_close(residual, total, total.double())
    assert_close(x, theirs, exact)


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(device, dtype, width):
    x = torch.randn(5, width, device=device).to(dtype) * 2 + 3
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    for w, b, offset in ((weight, bias, 0.0), (weight, None, 1.0), (None, None, 0.0)):
        wide = [None if t is None else t.double() for t in (w, b)]
        exact = reference.layer_norm(x.double(), *wide, 1e-5, offset)
        w_then = w if w is None or not offset else w + 1
        theirs = functional.layer_norm(x, (width,), w_then, b, 1e-5)
        assert_close(norm.layer_norm(x, w, b, 1e-5, offset), theirs, exact)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("size", [1, 127, 1100])
def test_gated(device, dtype, name, size):
    x = torch.randn(3, 2 * size, device=device).to(dtype) * 3
    x[0, 0] = -1000 if dtype != torch.float16 else -300
    act = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    }[name]
    gate, up = x.chunk(2, -1)
    exact = act(gate.double()) * up.double()
    assert_close(norm.gated(x, name), act(gate) * up, exact)


def test_opcheck(device):
    x, weight = torch.randn(3, 32, device=device), torch.rand(32, device=device)
    ops = torch.ops.llamatelemetry_triton
    opcheck(ops.rms_norm.default, (x, weight, 1e-6, 0.0))
    opcheck(ops.fused_add_rms_norm_.default, (x.clone(), x.clone(), weight, 1e-6, 0.0))
    opcheck(ops.layer_norm.default, (x, weight, None, 1e-5, 0.0))
    opcheck(ops.gated.default, (x, "silu"))


def test_refuses(device):
    x = torch.randn(3, 32, device=device)
    assert_refuses(lambda: norm.rms_norm(x, x[0, :5], 1e-6), "weight", "[32]", "[5]")
    assert_refuses(lambda: norm.rms_norm(x.double(), x[0], 1e-6), "float32", "float64")
    assert_refuses(lambda: norm.gated(x, "relu"), "activation", "'relu'")
    assert_refuses(lambda: norm.gated(x[:, :5], "silu"), "even", "5")


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_one_row(device, rows):
    x = torch.randn(rows, 8, device=device)
    assert norm.rms_norm(x, torch.ones(8, device=device), 1e-6).shape == (rows, 8)


def _pairs(device):
    """x and residual, and what both paths say of them: a part of a sentence, or that they agree."""
    rows = torch.randn(3, 2, 32, device=device).transpose(0, 1)
    halves = torch.randn(4, 64, device=device)
    long = torch.randn(4 * 32, device=device)
    return {
        "apart": (torch.randn(2, 3, 32, device=device), torch.randn(2, 3, 32, device=device), None),
        "halves": (halves[:, :32], halves[:, 32:], None),
        "empty": (torch.zeros(2, 0, device=device), torch.zeros(2, 0, device=device), None),
        "uneven": (torch.randn(2, 3, 32, device=device), rows, "residual must have evenly spaced"),
        "x": (long.view(4, 32), long.view(4, 32), "residual must not overlap x"),
        "meets x": (long[:96].view(3, 32), long[16:112].view(3, 32), "residual must not overlap x"),
        "itself": (
            torch.randn(4, 32, device=device),
            torch.randn(32, device=device).expand(4, 32),
            "residual must not overlap itself",
        ),
    }


@pytest.mark.parametrize("case", list(_pairs("cpu")))
@pytest.mark.parametrize("name", ["fused_add_rms_norm_", "fused_add_rms_norm_quantize_"])
def test_residuals_are_the_native_op_s(device, name, case):
    """What is refused, and what is added where."""
    kinds = (torch.int8,) if "quantize" in name else (1e-6,)
    found = []
    for module in (native, quantize if "quantize" in name else norm):
        torch.manual_seed(0)
        x, residual, refusal = _pairs(device)[case]
        weight = torch.ones(x.shape[-1], device=device)
        call = partial(getattr(module, name), x, residual, weight, *kinds)
        if refusal is not None:
            assert_refuses(call, refusal)
        else:
            found.append((call(), x, residual))
    if found:
        torch.testing.assert_close(*found)
