"""scaled_linear: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import quantize_rows, reference, scaled_linear

KINDS = [torch.int8, torch.float8_e4m3fn]
# m, n, k of the kernel for up to 16 rows: k is more than its warps take at once, and no whole units
FEW_ROWS = [(16, 264, 2064), (9, 40, 1040), (5, 300, 1104)]
# Of those for 17 to 64: more and fewer stages than a block holds.
SOME_ROWS = [(64, 264, 2064), (17, 520, 240)]


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return request.param


def case(device, kind, m, n, k):
    """x, its scales, the weight, its scales."""
    x, weight = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    return *quantize_rows(x, kind), *quantize_rows(weight, kind)


def assert_values(args, dtype, bias=None):
    ours = scaled_linear(*args, dtype, bias)
    expected = reference.scaled_linear(*args, dtype, bias)
    if args[0].dtype == torch.int8 and bias is None:
        assert torch.equal(ours, expected)
        return
    x, x_scales, weight, weight_scales = (t.double() for t in args)
    truth = (x @ weight.T) * x_scales * weight_scales.flatten()
    truth = truth if bias is None else truth + bias.double()
    if args[0].dtype == torch.int8 or dtype != torch.float32:
        assert_within_2x(ours, expected, truth)
    elif x.is_cuda:  # tensor cores sum products of e4m3 to some 14 bits, which float16 has not
        assert_within_2x(ours.half(), expected.half(), truth)
    else:  # sums in float32 against float64's, rounded
        wide = x.float() @ weight.float().T * x_scales.float() * weight_scales.float().flatten()
        assert_within_2x(ours, wide if bias is None else wide + bias, truth)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 8, 16), (3, 5, 7), (17, 33, 65), (129, 72, 136), (40, 200, 520), *FEW_ROWS, *SOME_ROWS],
)
def test_values(device, dtype, kind, m, n, k):
    args = case(device, kind, m, n, k)
    assert_values(args, dtype)
    assert_values(args, dtype, torch.randn(n, device=device).to(dtype))


def blocks_case(device, m, n, k):
    """x in blocks of 1 x 128 and the weight in blocks of 128 x 128, of sizes far apart."""
    x = torch.randn(m, k, device=device) * torch.rand(m, k, device=device) * 4
    q, scales = quantize_rows(x, torch.float8_e4m3fn, 128)
    weight = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    return q, scales, weight, torch.rand(-(-n // 128), -(-k // 128), device=device) + 0.1


def assert_blocks(args, dtype, bias=None):
    ours = scaled_linear(*args, dtype, bias, 128)
    expected = reference.scaled_linear(*args, torch.float64, bias, 128)
    x, scales, weight, weight_scales = args
    sizes = (x.float().abs(), scales, weight.float().abs(), weight_scales)
    limit = reference.scaled_linear(*sizes, torch.float64, None, 128)
    rounding = torch.finfo(dtype).eps * expected.abs()
    # Hopper's tensor cores keep some 14 bits of sums over 128.
    assert ((ours - expected).abs() <= rounding + limit * (2e-4 if x.is_cuda else 2e-6)).all()


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 8, 16), (3, 5, 130), (17, 200, 384), (130, 264, 520), *FEW_ROWS, *SOME_ROWS],
)
def test_blocks(device, dtype, m, n, k):
    args = blocks_case(device, m, n, k)
    assert_blocks(args, dtype)
    assert_blocks(args, dtype, torch.randn(n, device=device).to(dtype))


def test_blocks_of_nothing_and_poison(device):
    x, scales, weight, weight_scales = blocks_case(device, 4, 20, 300)
    none = scaled_linear(
        x[:, :0], scales[:, :0], weight[:, :0], weight_scales[:, :0], torch.half, None, 128
    )
    assert none.shape == (4, 20)
    assert not none.any()
    scales[2, 1] = torch.nan
    out = scaled_linear(x, scales, weight, weight_scales, torch.float32, None, 128)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.gpu
def test_blocks_of_many_tiles():
    assert_blocks(blocks_case(torch.device("cuda"), 2200, 4504, 200), torch.bfloat16)
    assert_blocks(blocks_case(torch.device("cuda"), 300, 700, 2064), torch.bfloat16)
    assert_blocks(blocks_case(torch.device("cuda"), 33, 17032, 520), torch.bfloat16)


@pytest.mark.gpu
def test_rows_among_others(kind):
    """From 17 to 64 rows the bits of one depend on no other."""
    x, x_scales, *weight = case(torch.device("cuda"), kind, 64, 300, 4112)
    whole = scaled_linear(x, x_scales, *weight, torch.float32)
    for m in (17, 40):
        assert torch.equal(scaled_linear(x[:m], x_scales[:m], *weight, torch.float32), whole[:m])


@pytest.mark.gpu
def test_many_tiles(kind):
    device = torch.device("cuda")
    for m, n, k in [(2200, 4504, 200), (300, 700, 2064), (33, 17032, 520)]:
        assert_values(case(device, kind, m, n, k), torch.bfloat16)


def test_leading_dimensions_strides_and_empty(device, kind):
    x, x_scales, weight, weight_scales = case(device, kind, 6, 20, 64)
    whole = scaled_linear(x, x_scales, weight, weight_scales, torch.float32)
    split = scaled_linear(
        x.view(2, 3, 64), x_scales.view(2, 3, 1), weight, weight_scales, torch.float32
    )
    assert torch.equal(split, whole.view(2, 3, 20))
    big = torch.zeros(20, 67, dtype=torch.uint8, device=device).view(kind)
    apart = big[:, 3:].copy_(weight)
    assert torch.equal(scaled_linear(x, x_scales, apart, weight_scales, torch.float32), whole)
    assert scaled_linear(x[:0], x_scales[:0], weight, weight_scales, torch.half).shape == (0, 20)
    none = scaled_linear(x[:, :0], x_scales, weight[:, :0], weight_scales, torch.float32)
    assert not none.any()


def test_poison_stays_in_its_row(device, kind):
    x = torch.randn(4, 64, device=device)
    x[2, 5] = torch.inf
    q, scales = quantize_rows(x, kind)
    weight = quantize_rows(torch.randn(20, 64, device=device), kind)
    out = scaled_linear(q, scales, *weight, torch.float32)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


def test_refusals(device):
    x, xs, w, ws = case(device, torch.int8, 2, 5, 8)
    half = torch.float16
    assert_refuses(lambda: scaled_linear(x.float(), xs, w, ws, half), "x must be int8 or float8")
    assert_refuses(lambda: scaled_linear(x, xs, w.float(), ws, half), "weight must have the dtype")
    assert_refuses(lambda: scaled_linear(x, xs, w[:, :7], ws, half), "weight must be [n, k]")
    assert_refuses(lambda: scaled_linear(x, xs[:1], w, ws, half), "a scale for each of the 2 rows")
    assert_refuses(
        lambda: scaled_linear(x, xs, w, ws.half(), half), "weight_scales must be float32"
    )
    assert_refuses(
        lambda: scaled_linear(x, xs, w, ws, torch.int8), "dtype must be float32, float16"
    )
    assert_refuses(lambda: scaled_linear(x, xs, w, ws, half, None, 128), "block must be None for")
    assert_refuses(lambda: scaled_linear(x, xs, w, ws, half, None, 64), "block must be None or 128")
    bias = torch.zeros(5, device=device)
    assert_refuses(lambda: scaled_linear(x, xs, w, ws, half, bias), "bias must be float16")
    assert_refuses(lambda: scaled_linear(x, xs, w, ws, torch.float32, bias[:4]), "bias must be [n]")
    wide = torch.zeros(1, 131072, dtype=torch.int8, device=device)
    one = torch.ones(1, device=device)
    assert_refuses(lambda: scaled_linear(wide, one, wide, one, half), "depth of at most 131071")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.zeros(5, device=device, requires_grad=True)
        args = [t.clone() for t in (x, xs, w, ws)]
        assert_refuses(lambda: scaled_linear(*args, torch.float32, grad), "bias must not require")


def test_refusals_of_scales_in_blocks(device):
    """As many scales in another order would be multiplied with what they do not belong to."""
    x, xs, w, ws = blocks_case(device, 3, 384, 256)

    def refused(x, x_scales, weight_scales, *sentence):
        args = (x, x_scales, w, weight_scales, torch.half, None, 128)
        assert_refuses(lambda: scaled_linear(*args), *sentence)

    weights = "weight_scales must be [ceil(n / 128), ceil(k / 128)] = [3, 2]"
    refused(x, xs, ws.T.contiguous(), weights, "[2, 3]")
    refused(x, xs, ws.flatten(), weights, "[6]")
    refused(x, xs, ws[:2], weights)
    rows = "x_scales must be [..., ceil(k / 128)], the leading sizes of x ([3, 256]) and 2 blocks"
    refused(x, xs.T.contiguous(), ws, rows, "[2, 3]")
    refused(x, xs.flatten(), ws, rows, "[6]")
    refused(x, xs[:, :1].contiguous(), ws, rows)
    refused(x.view(3, 1, 256), xs, ws, "the leading sizes of x ([3, 1, 256])")
    out = scaled_linear(x.view(3, 1, 256), xs.view(3, 1, 2), w, ws, torch.half, None, 128)
    assert torch.equal(out[:, 0], scaled_linear(x, xs, w, ws, torch.half, None, 128))
    assert torch.equal(out[1, 0], scaled_linear(x[1], xs[1], w, ws, torch.half, None, 128))


def test_opcheck(device, dtype):
    """Of int8: torch's checks multiply what they are given, which nobody can with e4m3."""
    args = case(device, torch.int8, 3, 5, 16)
    run_opcheck("scaled_linear", *args, dtype)
    run_opcheck("scaled_linear", *args, dtype, torch.zeros(5, device=device, dtype=dtype))


def test_reference(device, kind):
    """The rounded matrices' product, near the matrices' own."""
    x, weight = torch.randn(9, 256, device=device), torch.randn(7, 256, device=device)
    args = (*quantize_rows(x, kind), *quantize_rows(weight, kind))
    ours = reference.scaled_linear(*args, torch.float32)
    assert (ours - x @ weight.T).norm() < 0.06 * (x @ weight.T).norm()


def test_replay(device, kind):
    """Of bytes: torch compares no e4m3."""

    def inputs():
        q, scales, weight, weight_scales = case(device, kind, 5, 24, 40)
        return q.view(torch.uint8), scales, weight.view(torch.uint8), weight_scales

    assert_replays(
        lambda q, s, w, ws: scaled_linear(q.view(kind), s, w.view(kind), ws, torch.bfloat16),
        inputs(),
        inputs(),
    )


def test_compile(device):
    _, _, weight, scales = case(device, torch.int8, 1, 24, 64)
    rows = [quantize_rows(torch.randn(m, 64, device=device), torch.int8) for m in (2, 5, 20)]
    assert_compiles(lambda x, s: scaled_linear(x, s, weight, scales, torch.bfloat16), rows)
