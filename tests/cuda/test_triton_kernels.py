"""Triton: registry, launch and the three functions, compiled on a GPU, interpreted on the CPU.

TRITON_INTERPRET=1 must be set before anything imports Triton, so one test runs this file again in
a process of its own; in this one the functions take torch's ops for CPU tensors.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import INTERPRETED, assert_passes_interpreted
from tolerance import assert_within_2x
from torch.library import opcheck
from torch.nn.functional import layer_norm

from llamatelemetry.cuda import (
    TRITON_AVAILABLE,
    get_kernel,
    list_kernels,
    triton_add,
    triton_layernorm,
    triton_registry,
    triton_softmax,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:triton_.*torch's own op runs"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # the interpreter's numpy
]


def softmax_ref(x, dim):
    return torch.softmax(x.double(), dim)


def layer_norm_ref(x, weight=None, bias=None, eps=1e-5):
    weight, bias = (None if v is None else v.double() for v in (weight, bias))
    return layer_norm(x.double(), x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((5,), (5,)),
        ((), ()),
        ((3, 1, 4), (2, 1)),
        ((0, 3), (3,)),
        ((2, 3, 5, 7), ()),
        ((1025,), ()),
    ],
)
def test_add_broadcasts(device, dtype, a, b):
    x, y = (torch.randn(s, device=device).to(dtype) for s in (a, b))
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts bits off where GPUs round
        assert_within_2x(triton_add(x, y), x + y, x.double() + y.double())
    else:
        assert torch.equal(triton_add(x, y), x + y)


def test_add_takes_strides_and_promotes(device):
    x = torch.randn(6, 8, device=device)
    assert torch.equal(triton_add(x.t(), x.t()[:, ::1]), x.t() + x.t())
    assert torch.equal(triton_add(x[::2, 1::3], x[1::2, 1::3]), x[::2, 1::3] + x[1::2, 1::3])
    out = triton_add(x.half(), x)
    assert out.dtype == torch.float32
    assert torch.equal(out, x.half() + x)
    ints = torch.arange(-5, 5, device=device)
    assert torch.equal(triton_add(ints, ints.int()), ints * 2)


@pytest.mark.parametrize("width", [1, 3, 127, 128, 129, 768, 1000, 1300])
def test_layernorm_at_any_width(device, dtype, width):
    """At width 768 and mean 3 the output was scaled by 0.51: padding counted in the variance."""
    x = (torch.randn(3, width, device=device) * 2 + 3).to(dtype)
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    for args in ((None, None), (weight, None), (None, bias), (weight, bias)):
        ours = triton_layernorm(x, *args)
        assert_within_2x(ours, layer_norm(x, (width,), *args), layer_norm_ref(x, *args))


def test_layernorm_keeps_its_statistics_in_float32(device):
    x = torch.randn(4, 512, device=device).half() + 1000
    weight = torch.full((512,), 100.0, device=device)  # float32 beside float16
    ours = triton_layernorm(x, weight, eps=1e-3)
    exact = layer_norm_ref(x, weight, eps=1e-3)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.double(), exact, rtol=2**-10, atol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4, 5), (1, 1)])
def test_layernorm_over_any_leading_dims(device, shape):
    x = torch.randn(shape, device=device)
    assert_within_2x(triton_layernorm(x), layer_norm(x, shape[-1:]), layer_norm_ref(x))
    if len(shape) > 1:
        y = torch.randn(shape[::-1], device=device).permute(*range(len(shape))[::-1])
        assert_within_2x(triton_layernorm(y), layer_norm(y, shape[-1:]), layer_norm_ref(y))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_softmax_over_any_dim(device, dtype, dim):
    """float16 and bfloat16 could not be compiled."""
    x = torch.randn(3, 20, 5, device=device).to(dtype) * 4
    for y in (x, x.transpose(0, 2), x[:, ::3]):
        assert_within_2x(triton_softmax(y, dim), torch.softmax(y, dim), softmax_ref(y, dim))


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000, 1300])
def test_softmax_at_any_size(device, dtype, size):
    x = torch.randn(2, size, device=device).to(dtype)
    assert_within_2x(triton_softmax(x), torch.softmax(x, -1), softmax_ref(x, -1))


@pytest.mark.parametrize("size", [3, 300, 1300])
def test_softmax_of_masked_and_spoiled_rows(device, dtype, size):
    """A row of all -inf gives NaN, as in torch, and touches no other row."""
    x = torch.randn(6, size, device=device).to(dtype)
    x[1] = -torch.inf
    x[2, : size - 1] = -torch.inf
    x[3, 0] = torch.nan
    x[4, -1] = torch.inf
    ours = triton_softmax(x)
    assert ours.isnan().all(1).tolist() == [False, True, False, True, True, False]
    assert ours[2].tolist() == [0.0] * (size - 1) + [1.0]
    assert_within_2x(ours, torch.softmax(x, -1), softmax_ref(x, -1))


def test_scalars_and_empty_tensors(device):
    assert triton_softmax(torch.tensor(3.0, device=device), 0).item() == 1.0
    for shape in ((0,), (2, 0), (0, 2)):
        x = torch.empty(shape, device=device)
        assert triton_softmax(x).shape == triton_layernorm(x).shape == triton_add(x, x).shape


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_any_shape(device, shape, data):
    x = torch.randn(shape, device=device)
    y = x.permute(data.draw(st.permutations(range(x.ndim))))
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    assert_within_2x(triton_softmax(y, dim), torch.softmax(y, dim), softmax_ref(y, dim))
    assert_within_2x(triton_layernorm(y), layer_norm(y, y.shape[-1:]), layer_norm_ref(y))
    assert torch.equal(triton_add(y, y[..., :1]), y + y[..., :1])


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda x: triton_add(x, x.bool()), RuntimeError, ("triton_add: y must", "got bool")),
        (lambda x: triton_softmax(x.long()), RuntimeError, ("triton_softmax: x must", "int64")),
        (lambda x: triton_softmax(x, 2), IndexError, ("dim must be a dimension of x, 2-d, got 2",)),
        (lambda x: triton_layernorm(x, x), RuntimeError, ("weight must", "[4]", "[3, 4]")),
        (lambda x: triton_layernorm(x[0, 0]), RuntimeError, ("at least one dimension",)),
        (lambda x: triton_add(x, x.to("meta")), RuntimeError, ("y must be on the device", "meta")),
    ],
)
def test_refusals(device, call, error, parts):
    with pytest.raises(error) as caught:
        call(torch.zeros(3, 4, device=device))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_gradients_flow(device):
    with torch.inference_mode(False):
        x = torch.randn(2, 6, device=device, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        triton_softmax(triton_add(triton_layernorm(x), x), 0)[0].sum().backward()
        torch.softmax(layer_norm(twin, (6,)) + twin, 0)[0].sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_opcheck(device):
    ops = torch.ops.llamatelemetry_triton
    with torch.inference_mode(False), torch.no_grad():
        x, v = torch.randn(3, 5, device=device), torch.randn(5, device=device)
        opcheck(ops.add.default, (x, x[:, :1].half()))
        opcheck(ops.layernorm.default, (x, v, None, 1e-5))
        opcheck(ops.softmax.default, (x.t(), 1))


def test_compile_keeps_the_ops(device):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def chain(x, y):
        return triton_softmax(triton_layernorm(triton_add(x, y)), 0)

    torch._dynamo.reset()
    compiled = torch.compile(chain, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 4, 7):
        x = torch.randn(rows, 8, device=device)
        assert torch.equal(compiled(x, x), chain(x, x))
    for name in ("add", "layernorm", "softmax"):
        assert sum(f"llamatelemetry_triton.{name}" in target for target in seen) == 1, seen


@pytest.mark.slow
@pytest.mark.skipif(not TRITON_AVAILABLE, reason="needs Triton")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_this_file_with_the_interpreter():
    chosen = "not cuda- and not compile and not opcheck"
    assert_passes_interpreted("-k", chosen, __file__)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_interpreted_kernels_really_run():
    for name in list_kernels():
        assert triton_registry.is_interpreted(get_kernel(name).kernel_func)
