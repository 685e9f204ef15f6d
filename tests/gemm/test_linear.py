"""linear: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x
from torch.nn import functional

from llamatelemetry.inference.recording import Recording
from llamatelemetry.ops import linear, reference

BATCHES = [1, 2, 3, 7, 8, 9, 16, 17, 33, 65]
ACTIVATIONS = [None, "relu", "relu2", "silu", "gelu", "gelu_tanh"]
GATED = ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"]


def case(device, dtype, m, n, k, gated=False):
    """x, weight, bias, residual; the weight of the size that models have."""
    x, weight = torch.randn(m, k), torch.randn(n, k) / max(k, 1) ** 0.5
    bias, residual = torch.randn(n), torch.randn(m, n // 2 if gated else n)
    return [t.to(device, dtype) for t in (x, weight, bias, residual)]


def assert_values(x, weight, bias=None, residual=None, activation=None):
    ours = linear(x, weight, bias, residual, activation)
    args = (x, weight, bias, residual)
    wide = [None if t is None else t.double() for t in args]
    truth = reference.linear(*wide, activation)
    assert_within_2x(ours, reference.linear(*args, activation), truth)
    return ours


@pytest.mark.parametrize("m", BATCHES)
def test_values(device, dtype, m):
    x, weight, bias, residual = case(device, dtype, m, 70, 768)
    assert_values(x, weight)
    assert_values(x, weight, bias, residual)


@pytest.mark.parametrize("m", [1, 16, 40])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATED])
def test_activations(device, dtype, m, activation):
    x, weight, bias, residual = case(device, dtype, m, 70, 200, activation in GATED)
    assert_values(x, weight, bias, None, activation)
    assert_values(x, weight, None, residual, activation)


@pytest.mark.parametrize(("n", "k"), [(1, 8), (2, 33), (15, 64), (16, 72), (17, 520), (300, 8192)])
@pytest.mark.parametrize("m", [1, 5, 16])
def test_shapes(device, dtype, m, n, k):
    x, weight, bias, residual = case(device, dtype, m, n, k)
    assert_values(x, weight, bias, residual)
    if n % 2 == 0:
        assert_values(x, weight, bias, residual[:, : n // 2], "silu_and_mul")


@pytest.mark.parametrize("m", BATCHES)
def test_identity_gives_the_weights(device, dtype, m):
    """Row i of the identity picks column i of the weight, bit for bit."""
    weight = torch.randn(35, 96, device=device).to(dtype)
    x = torch.eye(96, device=device, dtype=dtype)
    out = torch.cat([linear(part, weight) for part in x.split(m)])
    assert torch.equal(out, weight.T)


def test_leading_dimensions_and_empty(device, dtype):
    x, weight, bias, _ = case(device, dtype, 6, 20, 64)
    ours = linear(x.view(2, 3, 64), weight, bias)
    assert torch.equal(ours, linear(x, weight, bias).view(2, 3, 20))
    assert linear(x[:0], weight, bias, activation="silu_and_mul").shape == (0, 10)
    assert linear(x, weight[:0]).shape == (6, 0)
    assert torch.equal(linear(x[:, :0], weight[:, :0], bias), bias.expand(6, 20))


@given(st.integers(1, 20), st.integers(0, 9), st.integers(0, 3), st.integers(1, 70))
def test_strided_rows_and_offsets(m, gap, offset, k):
    flat = torch.full((offset + m * (k + gap),), torch.nan)
    x = flat[offset:].view(m, k + gap)[:, :k]
    x.copy_(torch.randn(m, k))
    weight, residual = torch.randn(24, k + gap)[:, :k], torch.randn(m, 24 + gap)[:, :24]
    ours = linear(x, weight, None, residual)
    assert torch.equal(ours, linear(x.contiguous(), weight.contiguous(), None, residual.clone()))


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("gap", [3, 8])
def test_rows_apart(device, dtype, m, gap):
    """A gap of 3 puts rows where no wide load can start."""
    x, weight, bias, residual = case(device, dtype, m, 40, 256 + gap)
    residual = residual[:, :33]
    assert_values(x[:, gap:], weight[:33, gap:], bias[:33].clone(), residual)


def test_a_row_depends_on_no_other(device, dtype):
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("float32 is torch's matmul")
    x, weight, bias, _ = case(device, dtype, 16, 70, 520)
    for first, last in [(1, 8), (9, 16)] if device.type == "cuda" else [(1, 16)]:
        rows = linear(x[:last], weight, bias)
        for m in range(first, last + 1):
            assert torch.equal(linear(x[:m], weight, bias), rows[:m])
            assert torch.equal(linear(x[last - m : last], weight, bias), rows[-m:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_row(device, dtype, bad):
    x, weight, _, _ = case(device, dtype, 4, 33, 256)
    clean = linear(x, weight)
    x[2, 100] = bad
    ours = linear(x, weight)
    assert not ours[2].isfinite().any()
    assert torch.equal(ours[[0, 1, 3]], clean[[0, 1, 3]])


def test_large_sums_overflow_as_torch_does(device):
    """Sums are float32: only what is stored can leave float16's range."""
    x = torch.full((2, 64), 200.0, device=device, dtype=torch.float16)
    weight = torch.full((3, 64), 10.0, device=device, dtype=torch.float16)
    weight[1, 32:] = -10.0
    expected = torch.tensor([torch.inf, 0.0, torch.inf], device=device, dtype=torch.float16)
    assert torch.equal(linear(x, weight), expected.expand(2, 3))


def test_refusals(device):
    x, weight, bias, residual = case(device, torch.float32, 2, 20, 64)
    assert_refuses(lambda: linear(x.double(), weight), "x must be float32", "float64")
    assert_refuses(lambda: linear(x, weight.half()), "weight must have the dtype of x", "float16")
    assert_refuses(lambda: linear(x, weight[:, :32]), "weight must be [n, k] = [20, 64]")
    assert_refuses(lambda: linear(x, bias), "weight must be [n, k]", "shape [20]")
    assert_refuses(lambda: linear(x, weight, bias[:3]), "bias must be [n] = [20]", "[3]")
    assert_refuses(lambda: linear(x, weight, bias.half()), "bias must have the dtype of x")
    assert_refuses(
        lambda: linear(x, weight, None, residual[:1]),
        "residual must have the shape of the result, [2, 20]",
        "shape [1, 20]",
    )
    assert_refuses(
        lambda: linear(x, weight, activation="swish"),
        "activation must be one of {None, relu, relu2, silu",
        "got swish",
    )
    assert_refuses(
        lambda: linear(x, weight[:19], activation="silu_and_mul"),
        "weight must have an even number of rows for silu_and_mul",
        "got 19",
    )
    assert_refuses(lambda: linear(x.T, weight), "x must have a contiguous last dimension")
    assert_refuses(lambda: linear(x, weight.T.contiguous().T), "weight must have a contiguous last")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(20, 64, device=device, requires_grad=True)
        assert_refuses(lambda: linear(x.clone(), grad), "weight must not require grad")


@pytest.mark.parametrize("m", [2, 40])
def test_opcheck(device, dtype, m):
    x, weight, bias, residual = case(device, dtype, m, 20, 64)
    run_opcheck("linear", x, weight)
    run_opcheck("linear", x, weight, bias, residual, "gelu")
    run_opcheck("linear", x, weight, bias, residual[:, :10].clone(), "silu_and_mul")


def test_reference(device):
    x, weight, bias, residual = case(device, torch.float64, 3, 20, 64)
    gate, up = (x @ weight.T + bias).split(10, -1)
    ours = reference.linear(x, weight, bias, residual[:, :10], "silu_and_mul")
    torch.testing.assert_close(ours, residual[:, :10] + gate * gate.sigmoid() * up)
    ours = reference.linear(x, weight, None, residual, "gelu_tanh")
    expected = functional.gelu(x @ weight.T, approximate="tanh") + residual
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("m", [1, 16, 19])
def test_replay(device, dtype, m):
    if device.type == "cpu":
        m = min(m, 16)  # of more rows a recording has our kernel, and eager is torch's matmul

    def inputs():
        return case(device, dtype, m, 70, 288)

    assert_replays(lambda *args: linear(*args, "silu"), inputs(), inputs())


def test_any_number_of_rows_is_recorded(dtype):
    """Torch's matmul would not be part of the recording."""
    x, weight, bias, residual = case("cpu", dtype, 70, 40, 96, gated=True)
    with Recording() as recording:
        out = linear(x, weight, bias, residual, "gelu_and_mul")
    assert recording.num_launches == 1
    expected = reference.linear(x, weight, bias, residual, "gelu_and_mul")
    x.neg_().neg_()
    out.zero_()
    recording.replay()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
def test_compile(device, activation):
    _, weight, bias, _ = case(device, torch.bfloat16, 1, 48, 64)
    assert_compiles(
        lambda x: linear(x, weight, bias, activation=activation),
        [(torch.randn(m, 64, device=device).bfloat16(),) for m in (2, 5, 20)],
    )
