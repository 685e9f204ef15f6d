"""quant_linear with an activation: values, refusals, opcheck, replay; compile."""

from __future__ import annotations

import pytest
import torch
from gguf_rows import gguf_rows
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x
from torch.nn import functional

from llamatelemetry import ops
from llamatelemetry.inference.recording import Recording
from llamatelemetry.ops import QuantFormat, dequantize, quant_linear, reference, repack
from llamatelemetry.quantization.groups import GroupedWeight, pack_groups, unpack_groups

GATED = ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"]
ACTIVATIONS = ["relu", "relu2", "silu", "gelu", "gelu_tanh", *GATED]
FORMATS = ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_NL"]


def activated(y, activation):
    """The same by a call of its own."""
    if activation in GATED:
        return getattr(ops, activation)(y)
    return ops.activation(y, activation)


def torch_linear(x, weights, bias=None, exact=False):
    """torch's float32 linear, rounded to x's dtype. From 17 rows on quant_linear may round weights
    to that, unless exact: then the yardstick does."""
    if not exact and x.numel() // x.shape[-1] > 16:
        weights = weights.to(x.dtype).float()
    return functional.linear(x.float(), weights, None if bias is None else bias.float()).to(x.dtype)


def assert_values(x, data, format, bias, exact, activation):
    """Against float64; the yardstick rounds after each step, as modules apart do."""
    packed = repack(data, format)
    ours = quant_linear(x, packed, format, len(data), bias, exact, activation=activation)
    on_cuda = x.device.type == "cuda"
    wide, single = (None if bias is None else bias.to(d) for d in (torch.double, torch.float))
    truth = reference.quant_linear(
        x.double(), data, format, wide, exact or on_cuda, activation=activation
    )
    if on_cuda:
        y = torch_linear(x, reference.dequantize(data, format), bias, exact)
    else:
        y = reference.quant_linear(x.float(), data, format, single, exact).to(x.dtype)
    assert_within_2x(ours, activated(y, activation), truth)
    return ours, activated(quant_linear(x, packed, format, len(data), bias, exact), activation)


@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 17, 70])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [64, 70, 288])
def test_gates(device, dtype, format, n, m):
    x = torch.randn(m, 512, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype) if m % 2 else None
    data = gguf_rows(QuantFormat[format], n, 512, device)
    ours, apart = assert_values(x, data, QuantFormat[format], bias, False, "silu_and_mul")
    if device.type == "cpu":
        assert torch.equal(ours, apart)


@pytest.mark.parametrize("m", [1, 16, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
def test_activations(device, dtype, exact, activation, m):
    x = torch.randn(m, 768, device=device).to(dtype)
    data = gguf_rows(QuantFormat.Q4_K, 160, 768, device)
    bias = torch.randn(160, device=device).to(dtype)
    ours, apart = assert_values(x, data, QuantFormat.Q4_K, bias, exact, activation)
    if device.type == "cpu":
        assert torch.equal(ours, apart)


def grouped(format: str, n: int, k: int, group: int | None, device) -> GroupedWeight:
    groups = k // (group or k)
    scales = 0.01 * torch.randn(n, groups, device=device)
    if format == "U4":
        codes = torch.randint(0, 16, (n, k), device=device, dtype=torch.uint8)
        zeros = torch.randint(0, 16, (n, groups), device=device, dtype=torch.uint8)
        return pack_groups(codes, format, scales, zeros)
    bound = 8 if format == "S4" else 128
    codes = torch.randint(-bound, bound, (n, k), device=device, dtype=torch.int8)
    return pack_groups(codes, format, scales)


def of_groups(x, w, n, activation, bias=None, perm=None):
    return quant_linear(x, w.packed, w.format, n, bias, False, w.scales, w.zeros, perm, activation)


def assert_one_hot(product, weights, m, dtype):
    """Rows of zeros with a one each pick columns of the weights [n, k], gated in their dtype."""
    picked = torch.randint(0, weights.shape[1], (m,), device=weights.device)
    x = torch.zeros(m, weights.shape[1], device=weights.device, dtype=dtype)
    x[torch.arange(m, device=weights.device), picked] = 1.0
    columns = weights[:, picked].T.to(dtype).contiguous()
    assert torch.equal(product(x), ops.silu_and_mul(columns))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("format", "n", "k", "group"),
    [
        ("S4", 32, 128, 128),  # an item each
        ("S4", 28672, 4096, 128),  # seven pairs of tiles a block
        ("U4", 2 * 37 * 16, 1152, 64),  # nine items a tile, blocks that are not whole
        ("S4", 2048, 14336, 128),  # a cluster from two rows on
        ("U4", 2048, 14336, 128),
        ("U4", 40000, 256, 32),  # many tiles of few items
        ("S8", 4096, 4096, None),
        ("S8", 1056, 14336, 128),
    ],
)
def test_gates_on_uneven_shapes(format, n, k, group):
    w = grouped(format, n, k, group, "cuda")
    weights = unpack_groups(w, n, k)
    for m, dtype in [
        (1, torch.bfloat16), (1, torch.float16), (2, torch.bfloat16), (8, torch.float16),
        (9, torch.bfloat16), (16, torch.bfloat16), (16, torch.float16), (17, torch.float16),
        (33, torch.bfloat16), (70, torch.bfloat16), (130, torch.float16), (256, torch.bfloat16),
    ]:  # fmt: skip
        assert_one_hot(lambda x: of_groups(x, w, n, "silu_and_mul"), weights, m, dtype)
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        truth = reference.linear(x.double(), weights.double(), activation="silu_and_mul")
        theirs = ops.silu_and_mul(torch_linear(x, weights))
        assert_within_2x(of_groups(x, w, n, "silu_and_mul"), theirs, truth)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "format", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
)
def test_gates_of_blocks(format):
    format = QuantFormat[format]
    for n, k in [(28672, 2048), (2 * 37 * 16, 4096)]:
        rows = gguf_rows(format, n, k, "cuda")
        weights, packed = dequantize(rows, format, torch.float32), repack(rows, format)
        for m in (1, 2, 8, 16):
            assert_one_hot(
                lambda x, packed=packed, n=n: quant_linear(
                    x, packed, format, n, activation="silu_and_mul"
                ),
                weights,
                m,
                torch.bfloat16,
            )


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["S4", "U4"])
def test_a_row_depends_on_no_other(format):
    w = grouped(format, 2112, 1024, 128, "cuda")
    x = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
    for few, all_rows in [(2, 8), (5, 8), (9, 16)]:
        whole = of_groups(x[:all_rows], w, 2112, "silu_and_mul")
        assert torch.equal(of_groups(x[:few], w, 2112, "silu_and_mul"), whole[:few])


@pytest.mark.parametrize("format", ["S4", "U4", "S8"])
@pytest.mark.parametrize("m", [1, 16, 20])
def test_groups_with_sorted_columns(device, dtype, format, m):
    w = grouped(format, 96, 256, 64, device)
    x = torch.randn(m, 256, device=device).to(dtype)
    perm = torch.randperm(256, device=device).int()
    bias = torch.randn(96, device=device).to(dtype)
    ours = of_groups(x, w, 96, "gelu_tanh_and_mul", bias, perm)
    if device.type == "cpu":  # which rounds x too
        y = quant_linear(x, w.packed, format, 96, bias, False, w.scales, w.zeros, perm)
        assert torch.equal(ours, ops.gelu_tanh_and_mul(y))
        return
    weights, x = unpack_groups(w, 96, 256), x[:, perm.long()]
    wide = x.double(), weights.double(), bias.double()
    truth = reference.linear(*wide, activation="gelu_tanh_and_mul")
    assert_within_2x(ours, ops.gelu_tanh_and_mul(torch_linear(x, weights, bias)), truth)


@pytest.mark.sm80
@pytest.mark.parametrize(("n", "m", "fused"), [(4096, 16, 1), (4112, 16, 0), (4096, 17, 0)])
def test_gates_in_the_products_kernel(n, m, fused):
    """Another launch for them would need the whole product in memory."""
    packed = repack(gguf_rows(QuantFormat.Q4_0, n, 4096, "cuda"), "Q4_0")
    x = torch.randn(m, 4096, device="cuda", dtype=torch.float16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = quant_linear(x, packed, "Q4_0", n, activation="silu_and_mul")
    allocated = torch.cuda.max_memory_allocated() - before
    assert (allocated < 2 * out.nbytes) == fused


def test_empty(device):
    packed = repack(gguf_rows(QuantFormat.Q4_0, 20, 64, device), "Q4_0")
    x = torch.randn(2, 3, 64, device=device)

    def gated(x, packed, n, bias=None):
        return quant_linear(x, packed, "Q4_0", n, bias, activation="silu_and_mul")

    assert gated(x[:, :0], packed, 20).shape == (2, 0, 10)
    assert torch.equal(gated(x, packed, 20), gated(x.view(6, 64), packed, 20).view(2, 3, 10))
    none = repack(gguf_rows(QuantFormat.Q4_0, 0, 64, device), "Q4_0")
    assert gated(x, none, 0).shape == (2, 3, 0)
    bias = torch.randn(20, device=device)
    expected = ops.silu_and_mul(bias.expand(2, 3, 20).contiguous())
    assert torch.equal(gated(x[..., :0], packed[:, :0], 20, bias), expected)


def test_refusals(device):
    packed = repack(gguf_rows(QuantFormat.Q4_1, 21, 64, device), "Q4_1")
    x = torch.randn(2, 64, device=device)
    assert_refuses(
        lambda: quant_linear(x, packed, "Q4_1", 21, activation="swish"),
        "activation must be one of {None, relu, relu2, silu",
        "got swish",
    )
    assert_refuses(
        lambda: quant_linear(x, packed, "Q4_1", 21, activation="silu_and_mul"),
        "packed must have an even number of rows for silu_and_mul",
        "got 21",
    )


@pytest.mark.parametrize(
    ("activation", "got"), [("bogus_and_mul", "bogus"), ("silu_and_mul", "21")]
)
def test_a_fake_refuses_too(activation, got):
    packed = repack(gguf_rows(QuantFormat.Q4_1, 21, 64, "cpu"), "Q4_1").to("meta")
    x = torch.empty(2, 64, device="meta")
    rule = "activation must be one of" if got == "bogus" else "packed must have an even number"
    assert_refuses(
        lambda: quant_linear(x, packed, "Q4_1", 21, activation=activation),
        f"quant_linear: {rule}",
        f"got {got}",
    )
    weight = torch.empty(21, 64, device="meta")
    assert_refuses(
        lambda: ops.linear(x, weight, activation=activation),
        f"linear: {rule.replace('packed', 'weight')}",
        f"got {got}",
    )


@pytest.mark.parametrize("m", [2, 40])
def test_opcheck(device, dtype, m):
    packed = repack(gguf_rows(QuantFormat.Q4_K, 64, 256, device), "Q4_K")
    x = torch.randn(m, 256, device=device).to(dtype)
    sides = (None, False, None, None, None)
    run_opcheck("quant_linear", x, packed, "Q4_K", 64, *sides, "gelu")
    run_opcheck("quant_linear", x, packed, "Q4_K", 64, *sides, "silu_and_mul")


def test_reference(device):
    data = gguf_rows(QuantFormat.Q4_1, 6, 64, device)
    x, bias = torch.randn(2, 64, device=device).double(), torch.randn(6, device=device).double()
    ours = reference.quant_linear(x, data, "Q4_1", bias, True, activation="silu_and_mul")
    gate, up = (x @ reference.dequantize(data, "Q4_1").double().T + bias).split(3, -1)
    torch.testing.assert_close(ours, gate * gate.sigmoid() * up)


@pytest.mark.parametrize("m", [1, 16, 19])
def test_replay(device, dtype, m):
    def case():
        packed = repack(gguf_rows(QuantFormat.Q4_1, 64, 288, device), "Q4_1")
        return torch.randn(m, 288, device=device).to(dtype), packed

    assert_replays(
        lambda x, w: quant_linear(x, w, "Q4_1", 64, activation="silu_and_mul"), case(), case()
    )


def test_a_recording_has_it(dtype):
    packed = repack(gguf_rows(QuantFormat.Q4_1, 64, 288), "Q4_1")
    x = torch.randn(3, 288).to(dtype)
    with Recording() as recording:
        out = quant_linear(x, packed, "Q4_1", 64, activation="silu_and_mul")
    expected = ops.silu_and_mul(quant_linear(x, packed, "Q4_1", 64))
    out.zero_()
    recording.replay()
    assert torch.equal(out, expected)


def test_compile(device):
    packed = repack(gguf_rows(QuantFormat.Q8_0, 64, 64, device), "Q8_0")
    assert_compiles(
        lambda x: quant_linear(x, packed, "Q8_0", 64, activation="silu_and_mul"),
        [(torch.randn(m, 64, device=device),) for m in (2, 5, 20)],
    )
