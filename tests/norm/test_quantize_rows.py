"""quantize_rows, rms_norm_quantize, silu_and_mul_quantize: values, refusals, opcheck, replay."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import (
    quantize_rows,
    reference,
    rms_norm,
    rms_norm_quantize,
    silu_and_mul,
    silu_and_mul_quantize,
)

TARGETS = [torch.int8, torch.float8_e4m3fn]
SHAPES = [(1, 8), (3, 77), (5, 256), (2, 4096), (2, 5000)]


@pytest.fixture(params=TARGETS, ids=str)
def to(request):
    return request.param


def assert_same(ours, theirs):
    """Scales and bytes, all of them."""
    assert ours[0].dtype == theirs[0].dtype
    assert torch.equal(ours[1].nan_to_num(-1.0), theirs[1].nan_to_num(-1.0))
    assert torch.equal(ours[0].view(torch.uint8), theirs[0].view(torch.uint8))


def assert_a_step_apart(ours, theirs):
    """A sum in another order moves the norm by a rounding, and a value by a step at most."""
    q, scales = ours
    torch.testing.assert_close(scales, theirs[1], rtol=2**-7, atol=0.0)
    step = 1.0 if q.dtype == torch.int8 else 32.0  # of the largest e4m3
    assert (q.float() - theirs[0].float()).abs().max() <= step


@pytest.mark.parametrize("shape", SHAPES)
def test_values(device, dtype, to, shape):
    x = (torch.randn(shape) * torch.rand(shape[0], 1) * 9).to(device, dtype)
    assert_same(quantize_rows(x, to), reference.quantize_rows(x, to))
    q, scales = quantize_rows(x, to)
    error = (q.float() * scales - x.float()).abs()
    steps = scales / 2 if to == torch.int8 else x.float().abs() / 16 + scales * 2**-10
    assert (error <= steps * 1.01).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_made_rows(device, dtype, to, shape):
    """As the ops that make them, one after the other."""
    x = torch.randn(shape[0], 2 * shape[1], device=device).to(dtype)
    assert_same(silu_and_mul_quantize(x, to), quantize_rows(silu_and_mul(x), to))
    weight = torch.randn(2 * shape[1], device=device).to(dtype)
    for offset in (0.0, 1.0):
        ours = rms_norm_quantize(x, weight, to, 1e-5, offset)
        theirs = quantize_rows(rms_norm(x, weight, 1e-5, offset), to)
        (assert_same if device.type == "cpu" else assert_a_step_apart)(ours, theirs)


def test_every_e4m3(device):
    """All finite values, their halves between neighbours, and what lies past the largest."""
    codes = torch.arange(127, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
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
    assert not q[:2].float().any()
    assert scales[2:5].isnan().all()
    assert_same((q[5:], scales[5:]), quantize_rows(x[5:], to))


def test_shapes_and_strides(device, to):
    x = torch.randn(2, 3, 40, device=device)
    q, scales = quantize_rows(x, to)
    assert q.shape == (2, 3, 40)
    assert scales.shape == (2, 3, 1)
    apart = torch.full((6, 51), torch.nan, device=device)[:, 5:45].copy_(x.view(6, 40))
    assert_same(quantize_rows(apart, to), (q.view(6, 40), scales.view(6, 1)))
    q, scales = quantize_rows(x[:0], to)
    assert (q.shape, scales.shape) == ((0, 3, 40), (0, 3, 1))
    assert quantize_rows(x[..., :0], to)[1].tolist() == [[[0.0]] * 3] * 2


def test_refusals(device):
    x, weight = torch.randn(2, 9, device=device), torch.ones(9, device=device)
    assert_refuses(lambda: quantize_rows(x, torch.int16), "dtype must be int8 or float8", "int16")
    assert_refuses(lambda: quantize_rows(x.double(), torch.int8), "x must be float32", "float64")
    assert_refuses(lambda: quantize_rows(x.T, torch.int8), "x must have a contiguous last")
    assert_refuses(
        lambda: rms_norm_quantize(x, weight[:8], torch.int8), "weight must be [hidden_size] = [9]"
    )
    assert_refuses(lambda: silu_and_mul_quantize(x, torch.int8), "even last dimension", "got 9")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.ones(2, 8, device=device, requires_grad=True)
        assert_refuses(lambda: quantize_rows(grad, torch.int8), "x must not require grad")


def test_opcheck(device, dtype, to):
    x = torch.randn(3, 16, device=device).to(dtype)
    run_opcheck("quantize_rows", x, to)
    run_opcheck("rms_norm_quantize", x, x[0].clone(), to, 1e-5)
    run_opcheck("silu_and_mul_quantize", x, to)


def test_reference(device):
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0]], device=device)
    q, scales = reference.quantize_rows(x, torch.int8)
    assert q.tolist() == [[64, -127, 32, 0]]
    torch.testing.assert_close(scales, torch.full((1, 1), 2 / 127, device=device))


def test_replay(device, dtype, to):
    def inputs():
        return torch.randn(5, 64, device=device).to(dtype), torch.randn(64, device=device).to(dtype)

    def run(x, weight):
        made = (
            quantize_rows(x, to),
            rms_norm_quantize(x, weight, to),
            silu_and_mul_quantize(x, to),
        )
        return tuple(t.float() for pair in made for t in pair) if x.is_cuda else made[1]

    if device.type == "cuda":
        assert_replays(run, inputs(), inputs())
    else:  # a recording has our launches alone, and none of torch's conversions
        assert_replays(lambda x, w: rms_norm_quantize(x, w, torch.int8), inputs(), inputs())


def test_compile(device):
    weight = torch.ones(64, device=device)
    rows = [(torch.randn(m, 64, device=device),) for m in (2, 5, 20)]
    assert_compiles(lambda x: rms_norm_quantize(x, weight, torch.int8), rows)
    assert_compiles(lambda x: silu_and_mul_quantize(x, torch.int8), rows)
