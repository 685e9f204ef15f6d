"""quant_linear: values, refusals, opcheck, reference, replay; compile."""

from __future__ import annotations

import pytest
import torch
from gguf_rows import gguf_rows
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import QuantFormat, quant_linear, reference, repack

BATCHES = [1, 2, 3, 7, 8, 16, 17, 33, 128]


@pytest.fixture(params=list(QuantFormat), ids=lambda f: f.name)
def format(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["rounded", "exact"])
def exact(request):
    return request.param


def assert_values(x, data, format, bias, exact):
    """Against float64; the yardstick is torch's float32 matmul on the very same numbers."""
    ours = quant_linear(x, repack(data, format), format, len(data), bias, exact)
    exact = exact or x.device.type == "cuda"  # CUDA never rounds x
    truth = reference.quant_linear(
        x.double(), data, format, None if bias is None else bias.double(), exact
    )
    torch_s = reference.quant_linear(
        x.float(), data, format, None if bias is None else bias.float(), exact
    )
    assert_within_2x(ours, torch_s.to(x.dtype), truth)
    return ours


@pytest.mark.parametrize("m", BATCHES)
def test_values(device, dtype, format, exact, m):
    data = gguf_rows(format, 35, 768, device)
    x = torch.randn(m, 768, device=device).to(dtype)
    bias = torch.randn(35, device=device).to(dtype) if m % 2 else None
    assert_values(x, data, format, bias, exact)


@pytest.mark.parametrize(("n", "k"), [(1, 256), (16, 256), (17, 2560), (160, 512)])
def test_shapes(device, format, exact, n, k):
    assert_values(
        torch.randn(5, k, device=device), gguf_rows(format, n, k, device), format, None, exact
    )


@pytest.mark.parametrize("k", [32, 96, 576])
def test_blocks_of_32(device, exact, k):
    for format in (QuantFormat.Q4_1, QuantFormat.Q8_0):
        x = torch.randn(3, k, device=device)
        assert_values(x, gguf_rows(format, 20, k, device), format, None, exact)


def test_leading_dimensions_and_empty(device, exact):
    packed = repack(gguf_rows(QuantFormat.Q4_0, 20, 64, device), "Q4_0")
    x = torch.randn(2, 3, 64, device=device)
    ours = quant_linear(x, packed, "Q4_0", 20, exact=exact)
    flat = quant_linear(x.view(6, 64), packed, "Q4_0", 20, exact=exact)
    assert torch.equal(ours, flat.view(2, 3, 20))
    assert quant_linear(x[:, :0], packed, "Q4_0", 20, exact=exact).shape == (2, 0, 20)
    none = repack(gguf_rows(QuantFormat.Q4_0, 0, 64, device), "Q4_0")
    assert quant_linear(x, none, "Q4_0", 0, exact=exact).shape == (2, 3, 0)
    bias = torch.randn(20, device=device)
    no_k = quant_linear(x[..., :0], packed[:, :0], "Q4_0", 20, bias, exact)
    assert torch.equal(no_k, bias.expand(2, 3, 20))


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 3), st.booleans())
def test_strided_rows_and_offsets(m, gap, offset, exact):
    packed = repack(gguf_rows(QuantFormat.Q4_1, 24, 96), "Q4_1")
    flat = torch.full((offset + m * (96 + gap),), torch.nan)
    x = flat[offset:].view(m, 96 + gap)[:, :96]
    x.copy_(torch.randn(m, 96))
    ours = quant_linear(x, packed, "Q4_1", 24, exact=exact)
    assert torch.equal(ours, quant_linear(x.contiguous(), packed, "Q4_1", 24, exact=exact))


@pytest.mark.parametrize("m", [1, 5, 20])
def test_misaligned_rows(device, dtype, format, exact, m):
    flat = torch.full((3 + m * 515,), torch.nan, dtype=dtype, device=device)
    x = flat[3:].view(m, 515)[:, :512]
    x.copy_(torch.randn(m, 512))
    assert_values(x, gguf_rows(format, 24, 512, device), format, None, exact)


def test_a_row_depends_on_no_other(format, exact):
    packed = repack(gguf_rows(format, 40, 512), format)
    x = torch.randn(140, 512)
    alone = torch.cat([quant_linear(row, packed, format, 40, exact=exact) for row in x.split(1)])
    for m in (*BATCHES, 4, 5, 12, 66, 71, 140):
        assert torch.equal(quant_linear(x[:m], packed, format, 40, exact=exact), alone[:m])


@pytest.mark.parametrize("byte", [0x00, 0x77, 0x80, 0xFF])
def test_the_largest_products_fit(device, format, byte):
    """Codes and activations at their limits: sums of 16 bits on the way would wrap or saturate."""
    data = gguf_rows(format, 16, 256, device)
    for field in ("quants", "high_bits"):
        offset, size = format.facts.fields.get(field, (0, 0))
        data.view(16, -1, format.block_bytes)[..., offset : offset + size] = byte
    x = torch.ones(13, 256, device=device)
    x[1::3] = -1
    x[2::3, ::2] = -1
    for m in (1, 2, 13):
        assert_values(x[:m], data, format, None, exact=False)


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-38, 1e-30, 1e30])
def test_extreme_activations(device, format, scale):
    x = torch.randn(3, 256, device=device) * scale
    data = gguf_rows(format, 16, 256, device)
    ours = quant_linear(x, repack(data, format), format, 16)
    truth = reference.quant_linear(x.double(), data, format, None, exact=device.type == "cuda")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5 * scale + 1e-36)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_row(device, dtype, format, exact, bad):
    packed = repack(gguf_rows(format, 16, 512, device), format)
    x = torch.randn(4, 512, device=device).to(dtype)
    clean = quant_linear(x, packed, format, 16, exact=exact)
    x[2, 300] = bad
    ours = quant_linear(x, packed, format, 16, exact=exact)
    assert not ours[2].isfinite().any()
    rest = [0, 1, 3]
    assert torch.equal(ours[rest], clean[rest])


def test_refusals(device):
    packed = repack(gguf_rows(QuantFormat.Q4_1, 20, 64, device), "Q4_1")
    x, bias = torch.randn(2, 64, device=device), torch.randn(20, device=device)
    assert_refuses(lambda: quant_linear(x, packed, 5, 20), "format must be one of", "got 5")
    assert_refuses(
        lambda: quant_linear(x, packed, 3, 20, scales=bias),
        "scales must be None for Q4_1, whose blocks hold all that it needs, got a tensor of",
    )
    assert_refuses(lambda: quant_linear(x, packed, 3, 20, perm=bias), "perm must be None for Q4_1")
    assert_refuses(lambda: quant_linear(x.double(), packed, 3, 20), "x must be float32", "float64")
    assert_refuses(
        lambda: quant_linear(x[:, :40], packed, 3, 20), "k must be a multiple of 32 for Q4_1", "40"
    )
    assert_refuses(lambda: quant_linear(x, packed, 3, 33), "packed must be", "[3, 640]", "[2, 640]")
    assert_refuses(lambda: quant_linear(x[:, :32], packed, 3, 20), "packed must be", "[2, 320]")
    assert_refuses(lambda: quant_linear(x, packed.int(), 3, 20), "packed must be uint8", "int32")
    assert_refuses(lambda: quant_linear(x, packed, 3, 20, bias[:3]), "bias must be [n] = [20]")
    assert_refuses(lambda: quant_linear(x, packed, 3, 20, bias.half()), "bias must have the dtype")
    assert_refuses(
        lambda: quant_linear(x.T, packed, 3, 20), "x must have a contiguous last dimension"
    )
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(2, 64, device=device, requires_grad=True)
        assert_refuses(lambda: quant_linear(grad, packed, 3, 20), "x must not require grad")


def test_opcheck(device, dtype, format, exact):
    packed = repack(gguf_rows(format, 20, 256, device), format)
    x = torch.randn(2, 3, 256, device=device).to(dtype)
    run_opcheck("quant_linear", x, packed, format.value, 20, None, exact)
    run_opcheck("quant_linear", x[:, :0], packed, format.value, 20, x[0, 0, :20].clone(), exact)


def test_reference(device):
    """The oracle, against the formula with the integers written out."""
    data = gguf_rows(QuantFormat.Q8_0, 3, 64, device)
    x = torch.randn(2, 64, device=device)
    blocks = data.view(3, 2, 34)
    codes = blocks[..., 2:].contiguous().view(torch.int8).double()
    d = blocks[..., :2].contiguous().view(torch.float16).double()[..., 0]
    scale = x.view(2, 2, 32).abs().amax(-1) / torch.tensor(127.0)
    q = (x.view(2, 2, 32) * (1 / scale).unsqueeze(-1)).round().double()
    by_hand = torch.einsum(
        "mb,nb,mnb->mn", scale.double(), d, torch.einsum("mbj,nbj->mnb", q, codes)
    )
    ours = reference.quant_linear(x.double(), data, QuantFormat.Q8_0, None, exact=False)
    torch.testing.assert_close(ours, by_hand)


@pytest.mark.parametrize("m", [1, 19])
def test_replay(device, dtype, exact, m):
    def case():
        packed = repack(gguf_rows(QuantFormat.Q4_1, 70, 288, device), "Q4_1")
        return torch.randn(m, 288, device=device).to(dtype), packed

    assert_replays(lambda x, w: quant_linear(x, w, "Q4_1", 70, exact=exact), case(), case())


def test_compile(device, exact):
    packed = repack(gguf_rows(QuantFormat.Q8_0, 48, 64, device), "Q8_0")
    assert_compiles(
        lambda x: quant_linear(x, packed, "Q8_0", 48, exact=exact),
        [(torch.randn(m, 64, device=device),) for m in (2, 5, 20)],
    )
