"""fused_add_rms_norm_: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import fused_add_rms_norm_, reference, rms_norm


def case(device, dtype, shape):
    x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    return x, residual, torch.randn(shape[-1], dtype=dtype, device=device)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (2, 5, 576), (4, 4096), (1, 8191), (2, 40000), (1, 70001), (0, 16)]
)
def test_values(device, dtype, shape):
    x, residual, weight = case(device, dtype, shape)
    total = residual + x
    ours = x.clone()
    fused_add_rms_norm_(ours, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(ours, rms_norm(total, weight, 1e-5))
    assert_within_2x(
        ours,
        torch.nn.functional.rms_norm(total, (shape[-1],), weight, 1e-5),
        reference.rms_norm(total.double(), weight.double(), 1e-5),
    )


@pytest.mark.parametrize("shape", [(3, 7), (4, 4096), (1, 70001)])
def test_an_offset_of_the_weight(device, dtype, shape):
    x, residual, weight = case(device, dtype, shape)
    total = residual + x
    fused_add_rms_norm_(x, residual, weight, 1e-5, 1.0)
    assert torch.equal(residual, total)
    assert torch.equal(x, rms_norm(total, weight, 1e-5, 1.0))


@given(st.integers(1, 5), st.integers(1, 700), st.integers(0, 9), st.integers(0, 9))
def test_each_has_its_own_row_stride(num_tokens, hidden_size, gap_x, gap_residual):
    def strided(gap):
        return torch.full((num_tokens, hidden_size + gap), torch.nan)

    x, residual, weight = case("cpu", torch.float32, (num_tokens, hidden_size))
    wide_x, wide_residual = strided(gap_x), strided(gap_residual)
    wide_x[:, :hidden_size], wide_residual[:, :hidden_size] = x, residual
    fused_add_rms_norm_(wide_x[:, :hidden_size], wide_residual[:, :hidden_size], weight)
    fused_add_rms_norm_(x, residual, weight)
    assert torch.equal(wide_x[:, :hidden_size], x)
    assert torch.equal(wide_residual[:, :hidden_size], residual)
    assert wide_x[:, hidden_size:].isnan().all()
    assert wide_residual[:, hidden_size:].isnan().all()


def test_refusals(device):
    x, residual, weight = case(device, torch.float32, (2, 8))
    f = fused_add_rms_norm_
    assert_refuses(
        lambda: f(x, residual[:1], weight), "residual must have the shape of x", "[1, 8]"
    )
    assert_refuses(lambda: f(x, residual.half(), weight), "residual must have the dtype of x")
    assert_refuses(lambda: f(x, residual, weight[:3]), "weight must be [hidden_size] = [8]")
    assert_refuses(lambda: f(x.int(), residual, weight), "x must be float32, float16 or bfloat16")
    assert_refuses(lambda: f(x, x, weight), "residual must not overlap x, got memory 0 elements")
    assert_refuses(lambda: f(x[:1].expand(2, 8), residual, weight), "x must not overlap itself")
    assert_refuses(lambda: f(x, residual[:1].expand(2, 8), weight), "residual must not overlap")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(2, 8, device=device, requires_grad=True)
        plain = torch.randn(2, 8, device=device)
        assert_refuses(lambda: f(plain, grad, plain[0]), "residual must not require grad")


def test_x_and_residual_in_one_buffer(device):
    """Refused where rows of one are rows of the other, and served where they lie side by side."""
    weight = torch.ones(8, device=device)
    base = torch.randn(4, 8, device=device)
    x, residual = base[:3], base[1:]
    f = fused_add_rms_norm_
    assert_refuses(lambda: f(x, residual, weight), "residual must not overlap x", "memory 8 elem")
    assert_refuses(lambda: f(residual, x, weight), "residual must not overlap x", "memory -8 elem")
    wide = torch.randn(4, 20, device=device)
    assert_refuses(lambda: f(wide[:, :8], wide[:, 4:12], weight), "not overlap x", "memory 4 elem")
    for first, second in [(4, 12), (12, 0)]:
        side = wide[:, first : first + 8], wide[:, second : second + 8]
        apart = side[0].clone(), side[1].clone()
        f(*side, weight)
        f(*apart, weight)
        assert torch.equal(side[0], apart[0])
        assert torch.equal(side[1], apart[1])
    f(base[:2], base[2:], weight)  # one after the other


def test_opcheck(device, dtype):
    run_opcheck("fused_add_rms_norm_", *case(device, dtype, (2, 3, 24)), 1e-6)
    run_opcheck("fused_add_rms_norm_", *case(device, dtype, (0, 24)), 1e-6, 1.0)


def test_reference(device, dtype):
    # Quarters: their sums and squares are exact in any order, only the roundings are left.
    x, residual = (torch.randint(-8, 9, (16, 576), device=device).to(dtype) / 4 for _ in range(2))
    weight = torch.randn(576, dtype=dtype, device=device)
    total = (residual + x).float()
    normalised = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
    fused_add_rms_norm_(x, residual, weight, 1e-5)
    assert torch.equal(residual, total.to(dtype))
    assert torch.equal(x, weight * normalised.to(dtype))


def test_replay(device, dtype):
    first, second = (case(device, dtype, (4, 96)) for _ in range(2))
    assert_replays(fused_add_rms_norm_, first, second)


def test_compile(device):
    assert_compiles(fused_add_rms_norm_, [case(device, torch.float32, (n, 64)) for n in (2, 5, 9)])
