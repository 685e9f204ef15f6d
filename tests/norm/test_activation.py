"""activation: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x
from torch.nn import functional

from llamatelemetry.ops import activation, reference

TORCH = {
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}


@pytest.fixture(params=list(TORCH))
def kind(request):
    return request.param


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 1536), (1, 20001), (9,), (0, 8), (2, 0)])
def test_values(device, dtype, kind, shape):
    x = 3 * torch.randn(shape, dtype=dtype, device=device)
    ours = activation(x, kind)
    assert ours.is_contiguous()
    assert_within_2x(ours, TORCH[kind](x), reference.activation(x.double(), kind))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["relu", "relu2", "silu"])
def test_every_value_is_torch_s_to_the_bit(device, dtype, kind):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)
    ours, theirs = activation(x, kind), TORCH[kind](x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_changes_itself_alone(device, dtype, kind, bad):
    x = torch.randn(4, 40, device=device).to(dtype)
    clean = activation(x, kind)
    x[2, 30] = bad
    ours = activation(x, kind)
    # torch's own CPU paths differ at infinity: nothing but NaN is held to it.
    if bad != bad:
        assert ours[2, 30].isnan()
    clean[2, 30] = ours[2, 30] = 0.0
    assert torch.equal(ours, clean)


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 9), st.integers(0, 3))
def test_strided_rows_and_offsets(num_rows, size, gap, offset):
    flat = torch.full((offset + num_rows * (size + gap),), torch.nan)
    x = flat[offset:].view(num_rows, size + gap)[:, :size]
    x.copy_(torch.randn(num_rows, size))
    assert torch.equal(activation(x, "gelu"), activation(x.contiguous(), "gelu"))


def test_refusals(device, kind):
    x = torch.randn(2, 7, device=device)
    assert_refuses(
        lambda: activation(x, "silu_and_mul"),
        "activation: kind must be one of {relu, relu2, silu, gelu, gelu_tanh}, got silu_and_mul",
    )
    assert_refuses(lambda: activation(x.double(), kind), "x must be float32, float16", "float64")
    assert_refuses(lambda: activation(x.T, kind), "x must have a contiguous last dimension")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(2, 8, device=device, requires_grad=True)
        assert_refuses(lambda: activation(grad, kind), "x must not require grad")


def test_opcheck(device, dtype, kind):
    run_opcheck("activation", torch.randn(2, 3, 24, dtype=dtype, device=device), kind)
    run_opcheck("activation", torch.randn(0, 24, dtype=dtype, device=device), kind)


def test_reference(device, kind):
    x = torch.randn(3, 50, dtype=torch.float64, device=device)
    torch.testing.assert_close(reference.activation(x, kind), TORCH[kind](x))


def test_replay(device, dtype, kind):
    first, second = ((torch.randn(4, 96, device=device).to(dtype),) for _ in range(2))
    assert_replays(lambda x: activation(x, kind), first, second)


def test_compile(device, kind):
    inputs = [(torch.randn(n, 64, device=device),) for n in (2, 5, 9)]
    assert_compiles(lambda x: activation(x, kind), inputs)
