"""quant_linear's kernel for few rows, on shapes that divide its work unevenly.

Blocks share tiles among warps, and long rows among the blocks of a cluster: which depends on n, k
and m. The other files have the formats and small shapes.
"""

from __future__ import annotations

import pytest
import torch
from gguf_rows import gguf_rows
from packed_products import assert_one_hot_rows, assert_repacked_weights_are_seen, product
from tolerance import assert_within_2x

from llamatelemetry.ops import QuantFormat, dequantize, quant_linear, repack
from llamatelemetry.quantization.groups import GroupedWeight, pack_groups, unpack_groups

pytestmark = pytest.mark.gpu

# n, k, group; None: a scale a row
SHAPES = [
    (16, 128, 128),  # one item
    (6144, 4096, 128),  # three tiles a block
    (4096, 14336, 128),  # a cluster from two rows on
    (35 * 16 + 3, 1152, 64),  # 9 items a tile, a tile that is not whole
    (40000, 256, 32),  # many tiles of few items
    (512, 8320, None),
]


def grouped(n: int, k: int, group: int | None, format: str = "S4") -> GroupedWeight:
    groups = k // (group or k)
    scales = 0.01 * torch.randn(n, groups, device="cuda")
    if format == "FP4":  # by scales as files have them
        codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
        return pack_groups(codes, format, scales.half())
    if format != "U4":
        bound = 8 if format == "S4" else 128
        codes = torch.randint(-bound, bound, (n, k), device="cuda", dtype=torch.int8)
        if format == "E4M3":  # subnormal ones too
            codes = (0.002 * codes.float() ** 2 * codes.sign()).to(torch.float8_e4m3fn)
        return pack_groups(codes, format, scales)
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    zeros = torch.randint(0, 16, (n, groups), device="cuda", dtype=torch.uint8)
    return pack_groups(codes, format, scales, zeros)


def assert_values(ours: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
    truth = x.double() @ weights.double().T
    assert_within_2x(ours, (x.float() @ weights.T).to(x.dtype), truth)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_shapes(n, k, group):
    assert_grouped(n, k, group, "S4")


@pytest.mark.parametrize("format", ["S8", "E4M3"])
@pytest.mark.parametrize(("n", "k", "group"), [(35 * 16 + 3, 1152, 128), (4096, 14336, None)])
def test_bytes(format, n, k, group):
    assert_grouped(n, k, group, format)


@pytest.mark.parametrize(
    ("n", "k", "group"), [(563, 1152, 32), (563, 1152, 64), (4096, 14336, None)]
)
def test_fp4(n, k, group):
    assert_grouped(n, k, group, "FP4")


def assert_grouped(n: int, k: int, group: int | None, format: str) -> None:
    w = grouped(n, k, group, format)
    weights = unpack_groups(w, n, k)
    for m, dtype in [
        (1, torch.bfloat16), (1, torch.float16), (2, torch.bfloat16), (7, torch.float16),
        (8, torch.bfloat16), (9, torch.bfloat16), (16, torch.float16),
    ]:  # fmt: skip
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        assert_values(product(x, w, n), x, weights)
        assert_one_hot_rows(w, weights, m, dtype)


BLOCKS = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


@pytest.mark.parametrize("format", BLOCKS)
def test_scales_in_the_blocks(format):
    format = QuantFormat[format]
    for n, k, rows_of_x in [(1043, 2048, (1, 3, 16)), (4096, 14336, (1, 2))]:
        rows = gguf_rows(format, n, k, "cuda")
        weights, packed = dequantize(rows, format, torch.float32), repack(rows, format)
        for m in rows_of_x:
            for dtype in (torch.bfloat16, torch.float16):
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                assert_values(quant_linear(x, packed, format, n), x, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", BLOCKS)
def test_columns(format, dtype):
    """A row of zeros with a one picks a column of the weights, bit for bit: for each number of
    rows, of which each picks another, in rows that do not lie one behind the other."""
    format = QuantFormat[format]
    n, k = 1043, 2304
    rows = gguf_rows(format, n, k, "cuda")
    weights, packed = dequantize(rows, format, torch.float32), repack(rows, format)
    for m in range(1, 17):
        picked = torch.randperm(k, device="cuda")[:m]
        x = torch.zeros(m, k + 24, device="cuda", dtype=dtype)[:, 8 : 8 + k]
        x[torch.arange(m, device="cuda"), picked] = 1
        assert torch.equal(quant_linear(x, packed, format, n), weights[:, picked].T.to(dtype))


@pytest.mark.parametrize("format", ["S4", "U4", "S8"])
def test_rows_of_one_sign(format):
    """What the codes are too large by cancels against the sum of x, here as large as it gets."""
    w = grouped(256, 4096, 128, format)
    for dtype in (torch.float16, torch.bfloat16):
        x = 100 + torch.rand(5, 4096, device="cuda").to(dtype)
        assert_values(product(x, w, 256), x, unpack_groups(w, 256, 4096))


def test_sums_past_float16():
    """Of a run of weights more than 65504, of all of them less."""
    codes = torch.full((16, 256), 7, device="cuda", dtype=torch.int8)
    codes[:, 128:] = -7
    w = pack_groups(codes, "S4", torch.ones(16, 2, device="cuda"))
    x = torch.full((1, 256), 1000.0, device="cuda", dtype=torch.float16)
    assert torch.equal(product(x, w, 16), torch.zeros(1, 16, device="cuda", dtype=torch.float16))


@pytest.mark.parametrize(("k", "format"), [(1024, "S4"), (14336, "S4"), (1024, "S8")])
def test_a_row_depends_on_no_other(k, format):
    w = grouped(2112, k, 128, format)
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
    for few, all_rows in [(2, 8), (5, 8), (9, 16)]:
        assert torch.equal(product(x[:few], w, 2112), product(x[:all_rows], w, 2112)[:few])


def test_weights_made_by_the_kernel_ahead():
    """Weights are read before the kernel ahead has ended, unless it may have written them."""
    w = grouped(4096, 4096, 128)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    expected = product(x, w, 4096)
    target = GroupedWeight(torch.empty_like(w.packed), "S4", torch.empty_like(w.scales), None)
    bias = torch.zeros(4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        target.packed.random_(0, 256)
        target.scales.fill_(torch.inf)
        target.packed.copy_(w.packed)
        target.scales.copy_(w.scales)
        assert torch.equal(product(x, target, 4096, bias), expected)


@pytest.mark.parametrize("between", [False, True], ids=["repack", "repack, rms_norm"])
def test_weights_repacked_ahead(between):
    assert_repacked_weights_are_seen(1, between)
