"""Rows quantised in Triton, also by a norm or a gate: values, blocks, refusals, opcheck, graphs."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_refuses
from torch.library import opcheck

pytest.importorskip("triton")

from llamatelemetry.ops import reference
from llamatelemetry.triton_ops import norm
from llamatelemetry.triton_ops.quantize import (
    fused_add_rms_norm_quantize_,
    quantize_rows,
    rms_norm_quantize,
    silu_and_mul_quantize,
)

OPS = torch.ops.llamatelemetry_triton


@pytest.fixture(params=[torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
def to(request, device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with e4m3")
    return request.param


def assert_same(ours, theirs):
    """Scales and bytes, all of them."""
    assert ours[0].dtype == theirs[0].dtype
    assert torch.equal(ours[1].nan_to_num(-1.0), theirs[1].nan_to_num(-1.0))
    assert torch.equal(ours[0].view(torch.uint8), theirs[0].view(torch.uint8))


def assert_a_step_apart(ours, theirs):
    """A GPU may fuse a product and a sum of one kernel and not of the other."""
    q, scales = ours
    torch.testing.assert_close(scales, theirs[1], rtol=2**-7, atol=0.0)
    step = 1.0 if q.dtype == torch.int8 else 32.0  # of the largest e4m3
    assert (q.float() - theirs[0].float()).abs().max() <= step


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 300)])
def test_values(device, dtype, to, shape, block):
    x = (torch.randn(shape) * torch.rand(shape[0], 1) * 9).to(device, dtype)
    assert_same(quantize_rows(x, to, block), reference.quantize_rows(x, to, block))


@pytest.mark.parametrize("block", [None, 128])
def test_made_rows(device, dtype, to, block):
    """As the ops that make them, one after the other; of a sum, of the stored one."""
    x, residual = (torch.randn(3, 160, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(160, device=device).to(dtype)
    gated = quantize_rows(norm.gated(x, "silu"), to, block)
    alike = assert_same if device.type == "cpu" else assert_a_step_apart
    alike(silu_and_mul_quantize(x, to, block), gated)
    for offset in (0.0, 1.0):
        apart = quantize_rows(norm.rms_norm(x, weight, 1e-5, offset), to, block)
        alike(rms_norm_quantize(x, weight, to, 1e-5, offset, block), apart)
    given, total = x.clone(), residual.clone()
    norm.fused_add_rms_norm_(given, total, weight, 1e-5)
    ours = fused_add_rms_norm_quantize_(x, residual, weight, to, 1e-5, 0.0, block)
    assert torch.equal(residual, total)
    alike(ours, quantize_rows(given, to, block))


def test_every_e4m3(device):
    """All finite values, their halves between neighbours, and what lies past the largest."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with e4m3")
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2, -values])[None].to(device)
    q, scales = quantize_rows(x, torch.float8_e4m3fn)
    assert scales.item() == 1.0
    assert torch.equal(q.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_zeros_tiny_values_and_poison(device, to):
    x = torch.randn(6, 40, device=device)
    x[0] = 0.0
    x[1] = 1e-42
    x[2, 7], x[3, 7], x[4, 7] = torch.nan, torch.inf, -torch.inf
    q, scales = quantize_rows(x, to)
    assert not q[:5].float().any()
    assert scales[2:5].isnan().all()
    assert_same((q[5:], scales[5:]), quantize_rows(x[5:], to))


def test_shapes_and_strides(device, to):
    x = torch.randn(2, 3, 40, device=device)
    q, scales = quantize_rows(x, to)
    assert (q.shape, scales.shape) == ((2, 3, 40), (2, 3, 1))
    apart = torch.full((6, 51), torch.nan, device=device)[:, 5:45].copy_(x.view(6, 40))
    assert_same(quantize_rows(apart, to), (q.view(6, 40), scales.view(6, 1)))
    q, scales = quantize_rows(x[:0], to, 128)
    assert (q.shape, scales.shape) == ((0, 3, 40), (0, 3, 1))
    assert quantize_rows(x[..., :0], to)[1].tolist() == [[[0.0]] * 3] * 2


def test_opcheck(device):
    x, weight, to = torch.randn(3, 32, device=device), torch.rand(32, device=device), torch.int8
    opcheck(OPS.quantize_rows.default, (x, to, 128))
    opcheck(OPS.rms_norm_quantize.default, (x, weight, to, 1e-6, 0.0, None))
    args = (x.clone(), x.clone(), weight, to, 1e-6, 0.0, None)
    opcheck(OPS.fused_add_rms_norm_quantize_.default, args)
    opcheck(OPS.silu_and_mul_quantize.default, (x, to, None))


def test_one_graph_serves_any_number_of_rows(device):
    """Compiled, without a break."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    torch._dynamo.reset()

    def chain(x, weight):
        q, scales = rms_norm_quantize(x, weight, torch.int8)
        return quantize_rows(q.float() * scales, torch.int8)

    compiled = torch.compile(chain, backend=backend, fullgraph=True, dynamic=True)
    weight = torch.rand(48, device=device)
    for rows in (2, 5, 7):
        x = torch.randn(rows, 48, device=device)
        assert_same(compiled(x, weight), chain(x, weight))


def test_refuses(device):
    x, weight = torch.randn(2, 9, device=device), torch.ones(9, device=device)
    assert_refuses(lambda: quantize_rows(x, torch.int16), "dtype must be int8 or float8", "int16")
    assert_refuses(lambda: quantize_rows(x.double(), torch.int8), "x must be float32", "float64")
    assert_refuses(lambda: quantize_rows(x, torch.int8, 64), "block must be None or 128, got 64")
    assert_refuses(lambda: quantize_rows(x[0, 0], torch.int8), "x must be [..., size], got []")
    assert_refuses(lambda: rms_norm_quantize(x, weight[:8], torch.int8), "weight", "[9]", "[8]")
    assert_refuses(lambda: silu_and_mul_quantize(x, torch.int8), "even number of columns, got 9")
    add = fused_add_rms_norm_quantize_
    assert_refuses(lambda: add(x, x[:1], weight, torch.int8), "residual", "[2, 9]", "[1, 9]")
