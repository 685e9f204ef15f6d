"""quant_linear over formats whose scales and zero points are tensors of their own."""

from __future__ import annotations

import pytest
import torch
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import dequantize, quant_linear, reference
from llamatelemetry.quantization.groups import (
    GroupedWeight,
    pack_groups,
    rows_of_codes,
    unpack_groups,
)

BATCHES = [1, 8, 9, 17, 33, 64, 65, 129]


@pytest.fixture(params=["U4", "S4", "S8", "E4M3", "NF4"])
def format(request):
    return request.param


class Weight:
    """Random codes, scales and zero points, and what they are packed to."""

    def __init__(self, format, n, k, group, device, dtype=torch.float16):
        groups = k // (group or k)
        if format == "E4M3":
            codes = (9 * torch.randn(n, k)).to(torch.float8_e4m3fn)
        elif format in ("U4", "NF4", "FP4"):
            codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        else:
            bound = 8 if format == "S4" else 128
            codes = torch.randint(-bound, bound, (n, k), dtype=torch.int8)
        self.codes, self.n = codes.to(device), n
        self.scales = (0.01 * torch.randn(n, groups)).to(device, dtype)
        self.zeros = None
        if format == "U4":
            self.zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8).to(device)
        self.perm = None
        self.packed, self.format, *self.sides = pack_groups(
            self.codes, format, self.scales, self.zeros
        )

    def __call__(self, x, bias=None, exact=False):
        sides = (*self.sides, self.perm)
        return quant_linear(x, self.packed, self.format, self.n, bias, exact, *sides)

    def reference(self, x, bias, exact):
        rows = rows_of_codes(self.codes, self.format)
        sides = (self.scales, self.zeros, self.perm)
        return reference.quant_linear(x, rows, self.format, bias, exact, *sides)

    def assert_values(self, x, bias=None, exact=False):
        ours = self(x, bias, exact)
        # CUDA never rounds x, nor is it for codes without products in int8.
        exact = exact or x.device.type == "cuda" or self.format in ("E4M3", "NF4", "FP4")
        wide = [None if bias is None else bias.to(t) for t in (torch.float64, torch.float32)]
        truth = self.reference(x.double(), wide[0], exact)
        assert_within_2x(ours, self.reference(x.float(), wide[1], exact).to(x.dtype), truth)


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("m", BATCHES)
def test_values(device, dtype, format, exact, m):
    bias = torch.randn(35, device=device).to(dtype) if m % 2 else None
    x = torch.randn(m, 768, device=device).to(dtype)
    Weight(format, 35, 768, 128, device).assert_values(x, bias, exact)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group", "n", "k"), [(32, 16, 96), (64, 300, 768), (128, 49, 640)])
def test_groups(device, dtype, format, group, scales, n, k):
    for m in (1, 8, 20, 70):
        x = torch.randn(m, k, device=device).to(dtype)
        Weight(format, n, k, group, device, scales).assert_values(x)


@pytest.mark.parametrize("k", [96, 288])
def test_chunks_that_are_not_whole(device, dtype, format, k):
    for group in (32, None):
        for m in (1, 9, 40):
            x = torch.randn(m, k, device=device).to(dtype)
            Weight(format, 33, k, group, device).assert_values(x)


@pytest.mark.parametrize("m", BATCHES)
def test_identity_gives_the_weights(device, dtype, format, m):
    """Row i of the identity picks column i of the weight, rounded once."""
    weight = Weight(format, 40, 160, 32, device)
    expected = weight.reference(torch.eye(160, device=device), None, True).to(dtype)
    parts = torch.eye(160, device=device, dtype=dtype).split(m)
    assert torch.equal(torch.cat([weight(part, exact=True) for part in parts]), expected)
    if device.type == "cuda":
        assert torch.equal(torch.cat([weight(part) for part in parts]), expected)


@pytest.mark.parametrize("m", [1, 17])
def test_fp4(device, dtype, m):
    weight = Weight("FP4", 40, 160, 32, device)
    expected = weight.reference(torch.eye(160, device=device), None, True).to(dtype)
    parts = torch.eye(160, device=device, dtype=dtype).split(m)
    assert torch.equal(torch.cat([weight(part) for part in parts]), expected)
    weight.assert_values(torch.randn(m, 160, device=device).to(dtype))


@pytest.mark.parametrize("m", [1, 5, 40, 200])
def test_sorted_columns(device, dtype, m):
    weight = Weight("U4", 24, 512, 64, device)
    weight.perm = torch.randperm(512, device=device, dtype=torch.int32)
    weight.assert_values(torch.randn(m, 512, device=device).to(dtype))
    x = torch.randn(3 + m * 515, device=device).to(dtype)[3:].view(m, 515)[:, :512]
    weight.assert_values(x)
    weight.perm[7:9] = torch.tensor([-1, 512])  # no columns: as zeros
    sorted_x = x[:, weight.perm.clamp(0, 511).long()]
    sorted_x[:, 7:9] = 0
    ours = weight(x)
    weight.perm = None
    assert torch.equal(ours, weight(sorted_x))


def test_unpack_groups(device, format):
    weight = Weight(format, 35, 128, 64, device)
    packed = GroupedWeight(weight.packed, format, *weight.sides)
    expected = weight.reference(torch.eye(128, device=device), None, True).T
    assert torch.equal(unpack_groups(packed, 35, 128), expected)


@pytest.mark.parametrize("m", [1, 5, 20])
def test_misaligned_rows(device, dtype, format, m):
    x = torch.randn(3 + m * 515, device=device).to(dtype)[3:].view(m, 515)[:, :512]
    Weight(format, 24, 512, 64, device).assert_values(x)


def test_a_row_depends_on_no_other(format):
    weight, x = Weight(format, 40, 512, 64, "cpu"), torch.randn(65, 512)
    alone = torch.cat([weight(row) for row in x.split(1)])
    for m in (2, 16, 17, 65):
        assert torch.equal(weight(x[:m]), alone[:m])


def test_refusals(device):
    w = Weight("U4", 20, 256, 64, device)
    x = torch.randn(2, 256, device=device)
    scales, zeros = w.sides

    def call(scales=scales, zeros=zeros, format="U4", perm=None):
        return lambda: quant_linear(x, w.packed, format, 20, None, False, scales, zeros, perm)

    assert_refuses(call(scales=None), "scales must be given for U4", "got None")
    assert_refuses(call(zeros=None), "zeros must be given for U4", "got None")
    assert_refuses(call(format="S4"), "zeros must be None for S4")
    assert_refuses(call(scales.half()), "scales must be float32, got float16")
    assert_refuses(call(scales[0]), "scales must be [ceil(n / 16), groups, 16]", "[4, 16]")
    assert_refuses(call(scales[:1]), "scales must be [ceil(n / 16), groups, 16] = [2, 4, 16]")
    assert_refuses(
        call(scales[:, :3].contiguous(), zeros[:, :3].contiguous()),
        "scales must have one group of each 32, 64, 128 or all of the 256 weights of a row",
        "got 3 groups",
    )
    assert_refuses(call(zeros=zeros.int()), "zeros must be uint8, got int32")
    assert_refuses(call(zeros=zeros[:, :2].contiguous()), "zeros must be the shape of scales")
    perm = torch.arange(256, device=device)
    assert_refuses(call(perm=perm), "perm must be int32, got int64")
    assert_refuses(call(perm=perm[:9].int()), "perm must be [k] = [256]")
    assert_refuses(
        lambda: dequantize(w.packed, "U4"), "format must be one whose blocks hold", "got U4"
    )


def test_packing_refuses():
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2).half()
    zeros = torch.zeros(4, 2, dtype=torch.uint8)
    for call, sentence in [
        (lambda: pack_groups(codes, "U5", scales), "format must be one of"),
        (lambda: pack_groups(codes, "S4", scales), "codes must be .*int8"),
        (lambda: pack_groups(codes + 16, "U4", scales, zeros), "codes must be 0 to 15, got 16"),
        (lambda: pack_groups(codes, "U4", scales), "zeros must be given for U4"),
        (lambda: pack_groups(codes.view(torch.int8), "S4", scales, zeros), "zeros must be None"),
        (lambda: pack_groups(codes, "U4", scales[:3], zeros), r"scales must be \[4, groups\]"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()


def test_opcheck(device, dtype, format):
    w = Weight(format, 20, 256, 128, device)
    x = torch.randn(2, 3, 256, device=device).to(dtype)
    run_opcheck("quant_linear", x, w.packed, format, 20, None, False, *w.sides)


@pytest.mark.parametrize("m", [1, 19])
def test_replay(device, dtype, format, m):
    def case():
        w = Weight(format, 70, 256, 64, device)
        return torch.randn(m, 256, device=device).to(dtype), w.packed, *w.sides

    def call(x, packed, *sides):
        return quant_linear(x, packed, format, 70, None, False, *sides)

    assert_replays(call, case(), case())


def test_compile(device, format):
    w = Weight(format, 48, 64, 32, device)
    packed, scales, zeros = w.packed, *w.sides
    assert_compiles(
        lambda x: quant_linear(x, packed, format, 48, None, False, scales, zeros),
        [(torch.randn(m, 64, device=device),) for m in (5, 7, 20)],
    )
