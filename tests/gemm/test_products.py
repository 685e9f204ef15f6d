"""gemm, tensor_core_gemm, tensor_core_gemm_int8: values, refusals, opcheck, reference, replay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import assert_compiles, assert_refuses, assert_replays, run_opcheck
from tolerance import assert_within_2x

from llamatelemetry.ops import gemm, reference, tensor_core_gemm, tensor_core_gemm_int8

SHAPES = [(1, 1, 1), (3, 5, 7), (17, 33, 65), (64, 64, 64), (129, 200, 136), (130, 257, 72)]
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]
BACKENDS = ["sm90", "sm80", "sm75", "simt"]
NEED = {"sm90": (9, 0), "sm80": (8, 0), "sm75": (7, 5), "simt": (7, 5)}


def serving(device, dtype):
    """The backends of this machine for matrices of dtype."""
    if device.type == "cpu":
        return [None]
    served = [name for name in BACKENDS if torch.cuda.get_device_capability() >= NEED[name]]
    if dtype == torch.float32:
        return ["simt"]
    if dtype == torch.int8:
        return [name for name in served if name != "simt"]
    return [name for name in served if name != "sm75" or dtype == torch.float16]


def matrices(device, dtype, m, n, k, trans_a=False, trans_b=False, batch=()):
    """a and b, stored the way the flags say."""
    a, b = torch.randn(*batch, m, k), torch.randn(*batch, k, n)
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, x.shape).to(dtype) for x in (a, b))
    a, b = (a.mT if trans_a else a), (b.mT if trans_b else b)
    return [x.contiguous().to(device, dtype) for x in (a, b)]


def torch_wide(a, b, alpha=1.0, beta=0.0, trans_a=False, trans_b=False, c=None):
    """torch's product in float32; on CUDA by tensor cores too, whose sums are less exact."""
    if not a.is_cuda:
        return reference.tensor_core_gemm(a, b, alpha, beta, trans_a, trans_b, c)
    product = torch.mm if a.ndim == 2 else torch.bmm
    a, b = (a.mT if trans_a else a), (b.mT if trans_b else b)
    out = alpha * product(a, b, out_dtype=torch.float32)
    return out if c is None else out + beta * c


def assert_values(a, b, *args, backend=None, **options):
    """gemm and, of 16 bits, tensor_core_gemm against torch's product in the same dtype."""
    c = options.pop("c", None)
    truth = reference.gemm(
        a.double(), b.double(), *args, **options, c=None if c is None else c.double()
    )
    ours = gemm(a, b, *args, **options, c=c, backend=backend)
    if a.dtype == torch.float32:
        assert_within_2x(ours, reference.gemm(a, b, *args, **options, c=c), truth)
    else:
        assert_within_2x(ours, truth.to(a.dtype), truth)  # summed in float32, rounded once
    if a.dtype != torch.float32:
        wide_c = None if c is None else c.float()
        wide = tensor_core_gemm(a, b, *args, **options, c=wide_c, backend=backend)
        theirs = torch_wide(a, b, *args, **options, c=wide_c)
        assert_within_2x(wide, theirs, truth)
    return ours


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("trans_a", "trans_b"), LAYOUTS)
def test_values(device, dtype, m, n, k, trans_a, trans_b):
    a, b = matrices(device, dtype, m, n, k, trans_a, trans_b)
    for backend in serving(device, dtype):
        assert_values(a, b, trans_a=trans_a, trans_b=trans_b, backend=backend)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("trans_a", "trans_b"), LAYOUTS)
def test_int8_is_exact(device, m, n, k, trans_a, trans_b):
    a, b = matrices(device, torch.int8, m, n, k, trans_a, trans_b)
    truth = reference.tensor_core_gemm_int8(a, b, trans_a, trans_b)
    for backend in serving(device, torch.int8):
        assert torch.equal(tensor_core_gemm_int8(a, b, trans_a, trans_b, backend), truth)


def test_int8_at_the_end_of_its_range(device):
    a = torch.full((2, 131071), -128, dtype=torch.int8, device=device)
    for backend in serving(device, torch.int8):
        out = tensor_core_gemm_int8(a, a, trans_b=True, backend=backend)
        assert out.unique().tolist() == [128 * 128 * 131071]
    assert_refuses(
        lambda: tensor_core_gemm_int8(torch.cat([a, a], 1), a), "depth of at most 131071", "262142"
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("trans_a", "trans_b"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_many_tiles(dtype, trans_a, trans_b):
    """More tiles than multiprocessors, in groups that are not whole, of every width of sm90."""
    device = torch.device("cuda")
    for m, n, k in [(2200, 4500, 200), (1100, 1500, 328), (300, 700, 1160)]:
        a, b = matrices(device, dtype, m, n, k, trans_a, trans_b)
        for backend in serving(device, dtype):
            if dtype == torch.int8:
                ours = tensor_core_gemm_int8(a, b, trans_a, trans_b, backend)
                assert torch.equal(ours, reference.tensor_core_gemm_int8(a, b, trans_a, trans_b))
            else:
                flags = {"trans_a": trans_a, "trans_b": trans_b}
                ours = gemm(a, b, **flags, backend=backend)
                truth = reference.gemm(a.double(), b.double(), **flags)
                assert_within_2x(ours, truth.to(dtype), truth)
                # The same sums. Against torch's, which it splits, theirs are less exact.
                wide = tensor_core_gemm(a, b, **flags, backend=backend)
                assert torch.equal(wide.to(dtype), ours)


def test_alpha_beta(device, dtype):
    a, b = matrices(device, dtype, 35, 71, 40)
    c = torch.randn(35, 80, device=device).to(dtype)[:, 3:74]
    for backend in serving(device, dtype):
        assert_values(a, b, 0.5, backend=backend)
        assert_values(a, b, -2.0, 0.25, c=c, backend=backend)
        assert_values(a, b, 1.0, 1.0, c=c[:1].expand(35, 71), backend=backend)
        nan = torch.full_like(c, torch.nan)
        assert torch.equal(gemm(a, b, c=nan, backend=backend), gemm(a, b, backend=backend))


def test_batch(device, dtype):
    a, b = matrices(device, dtype, 20, 72, 48, batch=(3,))
    for backend in serving(device, dtype):
        ours = assert_values(a, b, backend=backend)
        for i in range(3):
            assert torch.equal(ours[i], gemm(a[i], b[i], backend=backend))
        shared = gemm(a, b[:1].expand(3, -1, -1), 1.0, 1.0, c=ours, backend=backend)
        assert_within_2x(
            shared, torch.baddbmm(ours, a, b[:1].expand(3, -1, -1)),
            a.double() @ b[:1].double() + ours.double(),
        )  # fmt: skip
    a, b = matrices(device, torch.int8, 20, 30, 33, batch=(3,))
    assert torch.equal(tensor_core_gemm_int8(a, b), reference.tensor_core_gemm_int8(a, b))


def test_empty(device, dtype):
    a, b = matrices(device, dtype, 4, 6, 8)
    c = torch.randn(4, 6, device=device).to(dtype)
    assert gemm(a[:0], b).shape == (0, 6)
    assert gemm(a, b[:, :0]).shape == (4, 0)
    assert not gemm(a[:, :0], b[:0]).any()
    assert torch.equal(gemm(a[:, :0], b[:0], 1.0, 2.0, c=c), 2 * c)
    empty = torch.empty(4, 0, dtype=torch.int8, device=device)
    assert torch.equal(
        tensor_core_gemm_int8(empty, empty, trans_b=True),
        torch.zeros(4, 4, dtype=torch.int32, device=device),
    )


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3),
    st.integers(0, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)  # fmt: skip
def test_strides(m, n, k, step, offset, dtype):
    """Every other row and column of a matrix in the middle of NaN, or of 99s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def place(x):
        rows, columns = (step * size + offset for size in x.shape)
        big = torch.full((rows, columns), 99 if dtype == torch.int8 else torch.nan)
        view = big.to(device, dtype)[offset::step, offset::step]
        return view.copy_(x)

    a, b = matrices(device, dtype, m, n, k)
    if dtype == torch.int8:
        assert torch.equal(
            tensor_core_gemm_int8(place(a), place(b)), reference.tensor_core_gemm_int8(a, b)
        )
    else:
        assert torch.equal(gemm(place(a), place(b)), gemm(a, b))


@pytest.mark.parametrize(("trans_a", "trans_b"), LAYOUTS)
def test_what_lies_past_the_matrix_is_not_read(device, dtype, trans_a, trans_b):
    """Aligned rows, whose last 16 bytes hold NaN behind k and behind the last row."""
    for m, n, k in [(9, 20, 67), (61, 3, 1)]:
        a, b = matrices("cpu", dtype, m, n, k, trans_a, trans_b)
        inside = []
        for x in (a, b):
            big = torch.full((x.shape[0] + 8, x.shape[1] + 128), torch.nan, dtype=dtype)
            big = big[:, : big.shape[1] // 8 * 8].clone().to(device)
            inside.append(big[: x.shape[0], : x.shape[1]].copy_(x))
        for backend in serving(device, dtype):
            assert_values(*inside, trans_a=trans_a, trans_b=trans_b, backend=backend)


def test_nan_and_inf_stay_in_their_row(device, dtype):
    a, b = matrices(device, dtype, 5, 33, 64)
    for backend in serving(device, dtype):
        clean = gemm(a, b, backend=backend)
        bad = a.clone()
        bad[2, 40] = torch.inf
        ours = gemm(bad, b, backend=backend)
        assert not ours[2].isfinite().any()
        assert torch.equal(ours[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_sums_past_float16(device):
    a = torch.full((2, 64), 200.0, device=device, dtype=torch.float16)
    b = torch.full((64, 3), 10.0, device=device, dtype=torch.float16)
    for backend in serving(device, torch.float16):
        assert gemm(a, b, backend=backend).isinf().all()
        assert gemm(a, b, 0.125, backend=backend).unique().tolist() == [16000.0]
        assert tensor_core_gemm(a, b, backend=backend).unique().tolist() == [128000.0]


def test_refusals(device):
    a, b = matrices(device, torch.float32, 3, 5, 8)
    c = torch.zeros(3, 5, device=device)
    half = a.half()
    assert_refuses(lambda: gemm(a.double(), b), "gemm: a must be float32, float16", "float64")
    assert_refuses(lambda: gemm(a, b.half()), "b must have the dtype of a", "float16")
    assert_refuses(lambda: gemm(a[0], b), "a must be a matrix or a batch", "shape [8]")
    assert_refuses(lambda: gemm(a, b[None]), "b must have as many dimensions as a", "[1, 8, 5]")
    assert_refuses(lambda: gemm(a, b, trans_b=True), "b must have 8 columns, the depth of a")
    assert_refuses(lambda: gemm(a, b[:7]), "b must have 8 rows, the depth of a", "[7, 5]")
    assert_refuses(
        lambda: gemm(a.expand(2, 3, 8), b.expand(3, 8, 5)), "b must have the batch of a (2)"
    )
    assert_refuses(lambda: gemm(a, b, 1.0, 2.0), "c must be given where beta is not 0", "None")
    assert_refuses(lambda: gemm(a, b, 1.0, 1.0, c=c[:2]), "c must have the shape of the result")
    assert_refuses(lambda: gemm(a, b, 1.0, 1.0, c=c.half()), "c must have the dtype of the result")
    assert_refuses(lambda: gemm(a, b, 1.0, 1.0, c=c.T.contiguous().T), "c must have a contiguous")
    assert_refuses(
        lambda: gemm(a, b, backend="fast"), "backend must be None or one of {sm90", "fast"
    )
    other = "sm80" if device.type == "cuda" else "simt"
    assert_refuses(lambda: gemm(a, b, backend=other), "must serve the call", f"got {other}")
    assert_refuses(lambda: tensor_core_gemm(a, b), "a must be float16 or bfloat16", "float32")
    assert_refuses(lambda: tensor_core_gemm(half, b.half(), 1.0, 1.0, c=c.half()), "c must have")
    assert_refuses(lambda: tensor_core_gemm_int8(a, b), "a must be int8", "float32")
    with torch.inference_mode(False), torch.enable_grad():
        grad = torch.randn(8, 5, device=device, requires_grad=True)
        assert_refuses(lambda: gemm(torch.ones(3, 8, device=device), grad), "b must not require")


def test_opcheck(device, dtype):
    a, b = matrices(device, dtype, 3, 5, 8)
    run_opcheck("gemm", a, b)
    run_opcheck("gemm", a, b, 0.5, 2.0, False, False, torch.zeros_like(a[:, :5]).contiguous())
    if dtype != torch.float32:
        run_opcheck("tensor_core_gemm", a.T.contiguous(), b, 1.0, 0.0, True, False)
    a, b = matrices(device, torch.int8, 3, 5, 8)
    run_opcheck("tensor_core_gemm_int8", a, b.T.contiguous(), False, True)


def test_reference(device):
    a, b, c = (torch.randn(*shape, device=device) for shape in [(3, 8), (8, 5), (3, 5)])
    expected = torch.addmm(c, a, b, beta=0.5, alpha=2.0)
    torch.testing.assert_close(reference.gemm(a, b, 2.0, 0.5, c=c), expected)
    torch.testing.assert_close(reference.gemm(a.T, b.T, 2.0, 0.5, True, True, c), expected)
    wide = reference.tensor_core_gemm(a.half(), b.half())
    torch.testing.assert_close(wide, a.half().float() @ b.half().float())
    ints = [torch.randint(-128, 128, s).to(torch.int8) for s in [(20, 64), (64, 8)]]
    assert torch.equal(reference.tensor_core_gemm_int8(*ints), torch._int_mm(*ints))


def test_replay(device, dtype):
    def inputs():
        return matrices(device, dtype, 20, 72, 40)

    assert_replays(gemm, inputs(), inputs())
    if dtype != torch.float32:
        assert_replays(tensor_core_gemm, inputs(), inputs())
    ints = [matrices(device, torch.int8, 20, 70, 40) for _ in range(2)]
    assert_replays(tensor_core_gemm_int8, *ints)


def test_compile(device):
    _, b = matrices(device, torch.bfloat16, 1, 48, 64)
    rows = [(torch.randn(m, 64, device=device).bfloat16(),) for m in (2, 5, 20)]
    assert_compiles(lambda a: gemm(a, b, 0.5), rows)
    assert_compiles(lambda a: tensor_core_gemm(a, b), rows)
    ints = b.to(torch.int8)
    assert_compiles(lambda a: tensor_core_gemm_int8(a.to(torch.int8), ints), rows)
