"""layer_norm: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import layer_norm, reference


def case(device, dtype, shape, mean=0.0):
    x = (torch.randn(shape, device=device) + mean).to(dtype)
    return x, *(torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))


def assert_right(x, weight, bias, eps=1e-5):
    assert_within_2x(
        layer_norm(x, weight, bias, eps),
        torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps),
        reference.layer_norm(
            x.double(),
            None if weight is None else weight.double(),
            None if bias is None else bias.double(),
            eps,
        ),
    )


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize(
    "shape", [(3, 7), (2, 5, 576), (4, 4096), (3, 1000), (1, 8191), (2, 40000), (1, 70001), (0, 16)]
)
def test_values(device, dtype, shape, mean):
    assert_right(*case(device, dtype, shape, mean))


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_weight_and_bias_are_optional(device, dtype, has_weight, has_bias):
    x, weight, bias = case(device, dtype, (5, 300), mean=3.0)
    assert_right(x, weight if has_weight else None, bias if has_bias else None)


@pytest.mark.parametrize("has_weight", [True, False])
def test_an_offset_of_the_weight(device, dtype, has_weight):
    x, weight, bias = case(device, dtype, (5, 300), mean=3.0)
    weight = weight if has_weight else None
    ours = layer_norm(x, weight, bias, 1e-5, 1.0)
    moved = None if weight is None else weight.double() + 1
    exact = reference.layer_norm(x.double(), moved, bias.double(), 1e-5)
    theirs = torch.nn.functional.layer_norm(
        x.float(), (300,), None if moved is None else moved.float(), bias.float(), 1e-5
    )
    assert_within_2x(ours, theirs.to(dtype), exact)


def test_a_large_mean_costs_no_variance(device):
    x = torch.randn(4, 777, device=device) + 1000
    ours = layer_norm(x)
    assert (ours.double() - reference.layer_norm(x.double(), None, None, 1e-5)).abs().max() < 1e-4


def hard_rows(hidden_size):
    """One row each of what a sum of squares, or distances from x[0], would lose the variance of."""
    random = torch.randn(7, hidden_size)
    random[0] += 1e4
    random[1, 0] = 1e4
    random[2, -1] = 1e4
    random[3, hidden_size // 2] -= 1e6
    random[4, : hidden_size // 8] += 1e4
    random[5, ::2] -= 1e4
    random[6] = 1e4 / 3
    return random


# In 16-byte vectors of float32: one a thread, two, four with more to read again; and single values.
@pytest.mark.parametrize("hidden_size", [1, 33, 777, 1000, 2040, 4096, 5120, 8191, 70000])
@pytest.mark.parametrize("has_weights", [False, True])
def test_hard_rows(device, hidden_size, has_weights):
    weights = torch.randn(2, hidden_size, device=device) if has_weights else (None, None)
    x = hard_rows(hidden_size).to(device)
    assert_right(x, *weights)
    assert torch.equal(layer_norm(x, *weights), layer_norm(x, *weights))
    # Each row too: a rounded mean moves every value, and every value is rounded; a few of each.
    ours, ref64 = layer_norm(x), reference.layer_norm(x.double(), None, None, 1e-5)
    mean = x.double().mean(-1, keepdim=True)
    rstd = torch.rsqrt((x.double() - mean).square().mean(-1, keepdim=True) + 1e-5)
    ulp = torch.finfo(torch.float32).eps * (mean.abs() * rstd + ref64.abs().amax(-1, keepdim=True))
    ulps = ((ours - ref64).abs() / ulp).amax(-1)
    assert (ulps <= 6 + hidden_size / 8192).all(), ulps


# From 8 rows a multiprocessor on rows of 2560, 4096 (float32), 5120 and 8192 (16 bits) go two to a
# block on the GPU, the last odd one twice.
@pytest.mark.parametrize("hidden_size", [2048, 2560, 4096, 4104, 5120, 8192])
@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("odd", [0, 1])
def test_a_row_does_not_depend_on_how_many_there_are(device, dtype, hidden_size, has_weights, odd):
    num_rows = 16
    if device.type == "cuda":
        num_rows = 8 * torch.cuda.get_device_properties(device).multi_processor_count + 2
    shape = (num_rows + odd, hidden_size + 8)
    x, *weights = (t[..., :hidden_size] for t in case(device, dtype, shape, mean=3.0))
    weights = [w.contiguous() for w in weights] if has_weights else (None, None)
    x[5] = torch.nan
    x[6, 3] = torch.inf
    many = layer_norm(x, *weights)
    assert many[5:7].isnan().all(1).tolist() == [True, True]
    assert_right(torch.cat((x[:5], x[7:])), *weights)
    for rows in (slice(0, 2), slice(4, 5), slice(7, num_rows // 2), slice(-3, None)):
        assert torch.equal(layer_norm(x[rows], *weights), many[rows])


@given(st.integers(1, 5), st.integers(1, 700), st.integers(0, 9), st.integers(0, 3))
def test_strided_rows_and_offsets(num_tokens, hidden_size, gap, offset):
    flat = torch.full((offset + num_tokens * (hidden_size + gap),), torch.nan)
    x = flat[offset:].view(num_tokens, hidden_size + gap)[:, :hidden_size]
    x.copy_(torch.randn(num_tokens, hidden_size))
    assert torch.equal(layer_norm(x), layer_norm(x.contiguous()))


def test_refusals(device):
    x, weight, bias = case(device, torch.float32, (2, 8))
    assert_refuses(lambda: layer_norm(x, weight[:3]), "weight must be [hidden_size] = [8]", "[3]")
    assert_refuses(lambda: layer_norm(x, weight, bias[:3]), "bias must be [hidden_size] = [8]")
    assert_refuses(lambda: layer_norm(x, weight, bias.half()), "bias must have the dtype of x")
    assert_refuses(lambda: layer_norm(x.double()), "x must be float32, float16 or bfloat16")
    assert_refuses(lambda: layer_norm(x.T), "x must have a contiguous last dimension")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(8, device=device, requires_grad=True)
        plain = torch.randn(2, 8, device=device)
        assert_refuses(lambda: layer_norm(plain, None, grad), "bias must not require grad")


def test_opcheck(device, dtype):
    x, weight, bias = case(device, dtype, (2, 3, 24))
    run_opcheck("layer_norm", x, weight, bias, 1e-5)
    run_opcheck("layer_norm", x, None, None, 1e-5)
    run_opcheck("layer_norm", x[:, :0], weight, None, 1e-5, 1.0)


def test_reference(device):
    x, weight, bias = (t.double() for t in case(device, torch.float32, (3, 50), mean=3.0))
    theirs = torch.nn.functional.layer_norm(x, (50,), weight, bias, 1e-5)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 1e-5), theirs)


def test_replay(device, dtype):
    assert_replays(layer_norm, case(device, dtype, (4, 96)), case(device, dtype, (4, 96)))


def test_compile(device):
    assert_compiles(layer_norm, [case(device, torch.float32, (n, 64)) for n in (2, 5, 9)])
