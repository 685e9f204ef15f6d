"""Rows quantised, also by a norm or a gate: values, blocks, refusals, opcheck, replay, compile."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck

from llamatelemetry.ops import (
    fused_add_rms_norm_quantize_,
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


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("shape", [(1, 8), (3, 77), (2, 4096), (2, 5000)])
def test_added_rows(device, dtype, to, shape, block):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], device=device).to(dtype)
    total = residual + x
    given = x.clone()
    ours = fused_add_rms_norm_quantize_(x, residual, weight, to, 1e-5, 1.0, block)
    assert torch.equal(residual, total)
    assert torch.equal(x, given)
    assert all(
        torch.equal(one.float(), other.float())
        for one, other in zip(
            ours, rms_norm_quantize(total, weight, to, 1e-5, 1.0, block), strict=True
        )
    )


@pytest.mark.parametrize("shape", [(3, 77), (5, 256), (2, 5000)])
def test_blocks(device, dtype, to, shape):
    """A block is a row of its own; the last one is of what is left."""
    x = (torch.randn(shape) * torch.rand(shape) * 9).to(device, dtype)
    x[-1, 3] = torch.inf
    ours = quantize_rows(x, to, 128)
    assert ours[1].shape == (shape[0], -(-shape[1] // 128))
    assert_same(ours, reference.quantize_rows(x, to, 128))
    for first in range(0, shape[1], 128):
        alone = quantize_rows(x[:, first : first + 128], to)
        assert_same((ours[0][:, first : first + 128], ours[1][:, first // 128, None]), alone)
    two = torch.cat([x, x], -1)
    assert_same(silu_and_mul_quantize(two, to, 128), quantize_rows(silu_and_mul(two), to, 128))


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
    assert_refuses(lambda: quantize_rows(x, torch.int8, 64), "block must be None or 128, got 64")
    add = fused_add_rms_norm_quantize_
    assert_refuses(lambda: add(x, x[:1], weight, torch.int8), "residual must have the shape of x")
    assert_refuses(lambda: add(x, x, weight, torch.int8), "residual must not overlap x")
    base = torch.randn(4, 9, device=device)
    assert_refuses(lambda: add(base[:3], base[1:], weight, torch.int8), "must not overlap x")
    assert_refuses(lambda: add(base[1:], base[:3], weight, torch.int8), "must not overlap x")
    assert_refuses(lambda: add(x, weight.expand(2, 9), weight, torch.int8), "not overlap itself")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.ones(2, 8, device=device, requires_grad=True)
        assert_refuses(lambda: quantize_rows(grad, torch.int8), "x must not require grad")


def test_opcheck(device, dtype, to):
    x = torch.randn(3, 16, device=device).to(dtype)
    run_opcheck("quantize_rows", x, to)
    run_opcheck("rms_norm_quantize", x, x[0].clone(), to, 1e-5)
    run_opcheck("silu_and_mul_quantize", x, to, 128)
    run_opcheck("fused_add_rms_norm_quantize_", x, x.clone(), x[0].clone(), to, 1e-5, 0.0, 128)


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
    residual = torch.randn(5, 64, device=device).to(dtype)
    add = fused_add_rms_norm_quantize_
    assert_replays(
        lambda x, y, w: add(x, y, w, torch.int8),
        *((x, residual.clone(), w) for x, w in (inputs(), inputs())),
    )


def test_compile(device):
    weight = torch.ones(64, device=device)
    rows = [(torch.randn(m, 64, device=device),) for m in (2, 5, 20)]
    assert_compiles(lambda x: rms_norm_quantize(x, weight, torch.int8), rows)
    assert_compiles(lambda x: silu_and_mul_quantize(x, torch.int8, 128), rows)
    add = fused_add_rms_norm_quantize_
    assert_compiles(lambda x: add(x, x + 1, weight, torch.int8), rows)
