"""cuda.gemm and tensor_core_gemm where a gradient is needed: value, checks and gradients."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_within_2x

from llamatelemetry.cuda import gemm, tensor_core_gemm

pytestmark = pytest.mark.usefixtures("grad_mode")

LAYOUTS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture
def grad_mode():
    with torch.inference_mode(False):
        yield


def operands(device, dtype, c_dtype, trans_a, trans_b, *batch):
    sizes = [(*batch, *((5, 3) if trans_a else (3, 5)))]
    sizes += [(*batch, *((4, 5) if trans_b else (5, 4))), (*batch, 3, 4)]
    dtypes = (dtype, dtype, c_dtype)
    return [
        torch.randn(size, device=device).to(kind).requires_grad_()
        for size, kind in zip(sizes, dtypes, strict=True)
    ]


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize(("trans_a", "trans_b"), LAYOUTS)
@pytest.mark.parametrize("product", [gemm, tensor_core_gemm])
def test_value_and_gradients(device, product, trans_a, trans_b, batch):
    half, single = torch.float16, torch.float32
    c_dtype = half if product is gemm else single
    a, b, c = given = operands(device, half, c_dtype, trans_a, trans_b, *batch)
    out = product(a, b, 0.5, 2.0, trans_a, trans_b, c)
    with torch.no_grad():
        assert torch.equal(out, product(a, b, 0.5, 2.0, trans_a, trans_b, c))
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, given, grad)

    def by_torch(bits):
        x, y, z = (tensor.detach().to(bits).requires_grad_() for tensor in given)
        whole = 0.5 * (x.mT if trans_a else x) @ (y.mT if trans_b else y) + 2.0 * z
        return torch.autograd.grad(whole, (x, y, z), grad.to(bits))

    for one, tensor, theirs, exact in zip(
        ours, given, by_torch(single), by_torch(torch.float64), strict=True
    ):
        assert one.dtype == tensor.dtype
        assert_within_2x(one, theirs.to(tensor.dtype), exact)


def test_one_rounding(device):
    a = torch.full((1, 4), 300.0, device=device, dtype=torch.float16, requires_grad=True)
    out = gemm(a, a.detach().mT, 1e-3)
    assert out.item() == 360
    out.backward()
    assert a.grad.tolist() == [[torch.tensor(0.3).half().item()] * 4]


def test_c_that_is_not_read(device):
    c = torch.full((2, 2), torch.nan, device=device, requires_grad=True)
    a = torch.ones(2, 2, device=device, requires_grad=True)
    out = gemm(a, a.detach(), c=c)
    assert out.tolist() == [[2, 2], [2, 2]]
    assert torch.autograd.grad(out.sum(), c, allow_unused=True) == (None,)


def test_checks_are_the_ops(device):
    x = torch.ones(2, 2, device=device, requires_grad=True)
    half, row = x.detach().half().requires_grad_(), torch.ones(2, device=device)
    with pytest.raises(RuntimeError, match=r"gemm: c must have the shape of the result, \[2, 2\]"):
        gemm(x, x, 1.0, 1.0, c=row)
    with pytest.raises(RuntimeError, match="gemm: b must be a matrix or a batch of matrices"):
        gemm(x, row)
    with pytest.raises(RuntimeError, match="tensor_core_gemm: a must be float16 or bfloat16"):
        tensor_core_gemm(x, x)
    with pytest.raises(RuntimeError, match="tensor_core_gemm: c must be given"):
        tensor_core_gemm(half, half, 1.0, 1.0)


def test_compiled_and_twice(device):
    a, b, _ = operands(device, torch.float32, torch.float32, False, False)
    compiled = torch.compile(gemm, backend="eager", fullgraph=True)
    (of_a,) = torch.autograd.grad(compiled(a, b).sum(), a)
    torch.testing.assert_close(of_a, b.detach().sum(1).expand(3, 5))
    (first,) = torch.autograd.grad(gemm(a, b).square().sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), b)
    (first,) = torch.autograd.grad((a @ b).square().sum(), a, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.sum(), b)[0])
