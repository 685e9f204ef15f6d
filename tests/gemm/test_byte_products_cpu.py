"""Products of bytes on the CPU: int8 against int64, rows that depend on no others, threads."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry.ops import quantize_rows, scaled_linear, tensor_core_gemm_int8

ENDS = torch.tensor([-128, -127, -1, 0, 1, 127], dtype=torch.int8)
# Rows for each count that the kernels multiply at once, and more than an item holds; k that are no
# whole steps, and longer than what lanes sum.
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 13, 65, 130]
SIZES = [(1, 1), (3, 15), (4, 16), (31, 63), (33, 64), (66, 65), (70, 1023), (5, 1024), (37, 2500)]


def ends(*shape):
    """Matrices of the values at which products of bytes saturate or wrap."""
    return ENDS[torch.randint(0, len(ENDS), shape)]


def exact(a, b):
    return (a.long() @ b.long().T).int()


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int8_is_int64s(m, n, k):
    a, b = ends(m, k), ends(n, k)
    truth = exact(a, b)
    assert torch.equal(tensor_core_gemm_int8(a, b, trans_b=True), truth)
    assert torch.equal(tensor_core_gemm_int8(a, b.T.contiguous()), truth)
    assert torch.equal(tensor_core_gemm_int8(a.T.contiguous(), b, True, True), truth)


@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize("values", [(-128, -128), (-128, 127), (127, -128), (127, 127)])
def test_int8_of_one_value_at_the_longest_depth(m, values):
    a, b = (torch.full((m, 131071), value, dtype=torch.int8) for value in values)
    out = tensor_core_gemm_int8(a, b, trans_b=True)
    assert (out == 131071 * values[0] * values[1]).all()


@pytest.mark.parametrize("m", [1, 6, 40])
def test_int8_of_rows_apart(m):
    """Rows that lie apart, beside values that no product may read."""
    wide_a, wide_b = torch.full((m, 300), 77).char(), torch.full((21, 311), 77).char()
    a, b = wide_a[:, 3:270], wide_b[:, 40:307]
    a.copy_(ends(*a.shape))
    b.copy_(ends(*b.shape))
    assert torch.equal(tensor_core_gemm_int8(a, b, trans_b=True), exact(a, b))
    wide_a[:, 270:], wide_b[:, :40] = -128, 127
    assert torch.equal(tensor_core_gemm_int8(a, b, trans_b=True), exact(a, b))


@pytest.mark.parametrize("m", [2, 6, 40])
def test_int8_of_columns_apart(m):
    """The same of matrices that lie the other way round."""
    wide_a, wide_b = torch.full((267, m + 9), 77).char(), torch.full((267, 50), 77).char()
    a, b = wide_a[:, 4 : m + 4], wide_b[:, 9:30]
    a.copy_(ends(*a.shape))
    b.copy_(ends(*b.shape))
    assert torch.equal(tensor_core_gemm_int8(a, b, True), exact(a.T, b.T))
    assert torch.equal(tensor_core_gemm_int8(a, b[:, ::2], True), exact(a.T, b[:, ::2].T))


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("m", [1, 5, 20])
def test_e4m3_that_lies_the_other_way_round(m, block):
    n, k = 70, 600
    x, scales = quantize_rows(torch.randn(m, k), torch.float8_e4m3fn, block)
    weight = quantize_rows(torch.randn(n, k), torch.float8_e4m3fn)[0]
    turned = weight.view(torch.uint8).T.contiguous().T.view(torch.float8_e4m3fn)
    weight_scales = torch.rand(n, 1) if block is None else torch.rand(1, 5)

    def product(weight):
        return scaled_linear(x, scales, weight, weight_scales, torch.float32, None, block)

    assert torch.equal(product(turned), product(weight))


@pytest.mark.parametrize(
    ("kind", "block"),
    [(torch.int8, None), (torch.float8_e4m3fn, None), (torch.float8_e4m3fn, 128)],
    ids=str,
)
def test_a_row_depends_on_no_other_and_on_no_thread(kind, block):
    n, k = 150, 1100
    x, scales = quantize_rows(torch.randn(140, k), kind, block)
    weight = quantize_rows(torch.randn(n, k), kind)[0]
    of_blocks = torch.rand(-(-n // 128), -(-k // 128)) + 0.1
    weight_scales = torch.rand(n, 1) if block is None else of_blocks

    def product(rows):
        return scaled_linear(
            x[:rows], scales[:rows], weight, weight_scales, torch.half, None, block
        )

    whole, threads = product(140), torch.get_num_threads()
    for rows in (1, 2, 3, 5, 8, 9, 16, 64, 65):
        assert torch.equal(product(rows), whole[:rows])
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(product(140), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(params=[False, True], ids=["", "flushed"])
def flushes(request):
    """Whether the CPU takes denormal floats as 0, as torch.set_flush_denormal has it do."""
    if not torch.set_flush_denormal(request.param) and request.param:
        pytest.skip("this CPU cannot flush denormals")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushes")
@pytest.mark.parametrize("rows", [1, 20])
def test_every_e4m3(rows):
    """All 256 bytes on both sides; both that are NaN make NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    one = torch.ones(rows, 1, dtype=torch.float8_e4m3fn)
    unit = torch.ones(256)
    out = scaled_linear(one, unit[:rows], codes[:, None], unit, torch.float32)
    torch.testing.assert_close(out, codes.float().expand(rows, 256), rtol=0, atol=0, equal_nan=True)
    out = scaled_linear(codes[:, None], unit, one[:1], unit[:1], torch.float32)
    torch.testing.assert_close(out, codes.float()[:, None], rtol=0, atol=0, equal_nan=True)
