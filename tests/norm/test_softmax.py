"""softmax: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import reference, softmax


@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (2, 5, 576), (2, 49152), (1, 8191), (2, 40000), (1, 70001), (0, 16)]
)
def test_values(device, dtype, shape, temperature):
    x = 4 * torch.randn(shape, dtype=dtype, device=device)
    theirs = torch.softmax(x.float() / temperature, -1).to(dtype)
    assert_within_2x(softmax(x, temperature), theirs, reference.softmax(x.double(), temperature))


def test_special_rows_touch_no_others(device, dtype):
    x = torch.randn(6, 37, dtype=dtype, device=device)
    plain = softmax(x)
    x[1, 5] = math.nan
    x[2] = -math.inf
    x[3, :30] = -math.inf
    x[4, 36] = math.inf
    ours, theirs = softmax(x), torch.softmax(x.float(), -1).to(dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[[1, 2, 4]].isnan().all()
    assert torch.equal(ours[[0, 5]], plain[[0, 5]])
    assert (ours[3, :30] == 0).all()
    assert ours[3, 30:].float().sum().item() == pytest.approx(1, abs=0.02)


def test_large_logits(device, dtype):
    x = torch.tensor([[6e4, 6e4, -6e4], [-6e4, -6e4, -6e4]], dtype=dtype, device=device)
    expected = torch.tensor([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]], device=device).to(dtype)
    assert torch.equal(softmax(x), expected)


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 9), st.integers(0, 3))
def test_strided_rows_and_offsets(num_rows, size, gap, offset):
    flat = torch.full((offset + num_rows * (size + gap),), torch.nan)
    x = flat[offset:].view(num_rows, size + gap)[:, :size]
    x.copy_(torch.randn(num_rows, size))
    assert torch.equal(softmax(x), softmax(x.contiguous()))


def test_refusals(device):
    x = torch.randn(2, 8, device=device)
    for temperature in (0.0, -1.0, math.nan):
        assert_refuses(lambda t=temperature: softmax(x, t), "temperature must be positive")
    assert_refuses(lambda: softmax(x.int()), "x must be float32, float16 or bfloat16", "int32")
    assert_refuses(lambda: softmax(x.T), "x must have a contiguous last dimension")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(2, 8, device=device, requires_grad=True)
        assert_refuses(lambda: softmax(grad), "x must not require grad")


def test_opcheck(device, dtype):
    run_opcheck("softmax", torch.randn(2, 3, 24, dtype=dtype, device=device), 0.7)
    run_opcheck("softmax", torch.randn(0, 24, dtype=dtype, device=device), 1.0)


def test_reference(device):
    x = torch.randn(3, 50, dtype=torch.float64, device=device)
    torch.testing.assert_close(reference.softmax(x, 0.7), torch.softmax(x / 0.7, -1))


def test_replay(device, dtype):
    first, second = ((torch.randn(4, 96, device=device).to(dtype), 0.7) for _ in range(2))
    assert_replays(softmax, first, second)


def test_compile(device):
    assert_compiles(softmax, [(torch.randn(n, 64, device=device), 0.7) for n in (2, 5, 9)])
