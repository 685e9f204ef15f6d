"""quant_linear's kernel for 17 to 256 rows on Hopper, on shapes that divide its work unevenly.

Blocks are tall where tiles are few and wide where they are many, and share k in clusters: which
depends on n, k and m. The other files have the formats and small shapes.
"""

from __future__ import annotations

import pytest
import torch
from packed_products import assert_one_hot_rows, assert_repacked_weights_are_seen, product
from tolerance import assert_within_2x

from llamatelemetry.ops import QuantFormat, dequantize, quant_linear, repack
from llamatelemetry.quantization.groups import GroupedWeight, pack_groups, unpack_groups

pytestmark = pytest.mark.sm90

# n, k, group; None: a scale a row
SHAPES = [
    (16, 128, 128),  # one tile, one chunk
    (6144, 4096, 128),  # 96 blocks of 64 rows up to 64 tokens
    (4096, 4096, 128),  # clusters of two
    (16 * 531 + 3, 1152, 64),  # wide blocks, 9 chunks, a tile that is not whole
    (40000, 256, 128),  # more blocks than places
    (512, 8352, None),  # many chunks for few tiles, the last not whole
]


def grouped(n: int, k: int, group: int | None, format: str) -> GroupedWeight:
    groups = k // (group or k)
    scales = 0.01 * torch.randn(n, groups, device="cuda")
    scales[n // 2 :] = scales[n // 2 :].half()  # as checkpoints have them: decoded in another way
    if format == "E4M3":
        return pack_groups(
            (9 * torch.randn(n, k, device="cuda")).to(torch.float8_e4m3fn), format, scales
        )
    if format in ("S4", "S8"):
        bound = 8 if format == "S4" else 128
        codes = torch.randint(-bound, bound, (n, k), device="cuda", dtype=torch.int8)
        return pack_groups(codes, format, scales)
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    if format == "NF4":
        return pack_groups(codes, format, scales)
    w = pack_groups(codes, format, scales, torch.zeros_like(scales, dtype=torch.uint8))
    w.zeros.random_(0, 256)  # more than a packed checkpoint has
    return w


def assert_values(ours: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
    """The yardstick is torch's matmul over the weights rounded to x's dtype, as ours may be."""
    truth = x.double() @ weights.double().T
    assert_within_2x(ours, (x.float() @ weights.to(x.dtype).float().T).to(x.dtype), truth)


def assert_products(w: GroupedWeight, weights: torch.Tensor, m: int, dtype: torch.dtype) -> None:
    n, k = weights.shape
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    assert_values(product(x, w, n), x, weights)
    assert_one_hot_rows(w, weights, m, dtype)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("format", ["S4", "U4"])
def test_shapes(n, k, group, format):
    w = grouped(n, k, group, format)
    weights = unpack_groups(w, n, k)
    for m, dtype in [
        (17, torch.bfloat16), (32, torch.float16), (61, torch.bfloat16), (64, torch.float16),
        (100, torch.bfloat16), (128, torch.float16), (129, torch.bfloat16), (256, torch.bfloat16),
    ]:  # fmt: skip
        assert_products(w, weights, m, dtype)


@pytest.mark.parametrize(("n", "k", "group"), [SHAPES[3], SHAPES[4], SHAPES[5]])
@pytest.mark.parametrize("format", ["S8", "E4M3", "NF4"])
def test_bytes_and_float_tables(n, k, group, format):
    w = grouped(n, k, group, format)
    weights = unpack_groups(w, n, k)
    for m, dtype in [
        (20, torch.bfloat16), (50, torch.float16), (100, torch.bfloat16), (200, torch.float16),
    ]:  # fmt: skip
        assert_products(w, weights, m, dtype)


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_scales_in_the_blocks(format):
    format = QuantFormat[format]
    # Deep blocks in clusters, deep blocks alone, and wide blocks up to 128 rows of x.
    for n, k in [(1040, 2304), (12000, 1024), (40000, 256)]:
        rows = torch.randint(0, 64, (n, format.row_bytes(k)), device="cuda", dtype=torch.uint8)
        weights = dequantize(rows, format, torch.float32)
        packed = repack(rows, format)
        for m in (20, 50, 128, 200):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            assert_values(quant_linear(x, packed, format, n), x, weights)


def test_strided_rows_and_bias():
    w = grouped(200, 512, 128, "S4")
    x = torch.full((70, 1024), torch.nan, device="cuda", dtype=torch.bfloat16)[:, 128:640]
    x.copy_(torch.randn(70, 512))
    bias = torch.randn(200, device="cuda", dtype=torch.bfloat16)
    ours = product(x, w, 200, bias)
    assert torch.equal(ours, product(x.contiguous(), w, 200, bias))
    truth = x.double() @ unpack_groups(w, 200, 512).double().T + bias.double()
    torch.testing.assert_close(ours.double(), truth, rtol=1e-2, atol=1e-2)


def test_sums_past_float16():
    """Of a chunk of weights more than 65504, of all of them less."""
    codes = torch.full((16, 256), 7, device="cuda", dtype=torch.int8)
    codes[:, 128:] = -7
    w = pack_groups(codes, "S4", torch.ones(16, 2, device="cuda"))
    x = torch.full((20, 256), 1000.0, device="cuda", dtype=torch.float16)
    assert torch.equal(product(x, w, 16), torch.zeros(20, 16, device="cuda", dtype=torch.float16))


@pytest.mark.parametrize("k", [1024, 14336])
def test_a_row_depends_on_no_other(k):
    w = grouped(2112, k, 128, "S4")
    x = torch.randn(256, k, device="cuda", dtype=torch.bfloat16)
    for few, all_rows in [(17, 32), (33, 64), (65, 128), (129, 256)]:
        assert torch.equal(product(x[:few], w, 2112), product(x[:all_rows], w, 2112)[:few])


@pytest.mark.parametrize("between", [False, True], ids=["repack", "repack, rms_norm"])
def test_weights_repacked_ahead(between):
    assert_repacked_weights_are_seen(40, between)
