"""Triton kernels by name: registry, launches, configurations, and that ours compile."""

from __future__ import annotations

import os

import pytest
import torch

from llamatelemetry.cuda import (
    TRITON_AVAILABLE,
    KernelConfig,
    TritonKernel,
    get_kernel,
    list_kernels,
    register_kernel,
    triton_add,
    triton_registry,
)
from llamatelemetry.cuda.triton_configs import TUNED, tuning_for

BY_COMPILER = pytest.mark.skipif(
    not TRITON_AVAILABLE or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, not interpreted",
)
pytestmark = pytest.mark.filterwarnings("ignore:triton_.*torch's own op runs")


class InterpretedFunction:
    """Stands for a kernel: launched, it does what it is given and notes how."""

    def __init__(self, body, names=("x_ptr", "y_ptr", "out_ptr", "num_elements", "BLOCK_SIZE")):
        self.body, self.arg_names, self.launches = body, list(names), []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((grid, kwargs))
            self.body(*args)

        return launch


@pytest.fixture
def registry(monkeypatch):
    """What is registered here is forgotten after the test; there is a Triton."""
    monkeypatch.setattr(triton_registry, "_registry", dict(triton_registry._registry))
    monkeypatch.setattr(triton_registry, "TRITON_AVAILABLE", True)


def test_registry(registry):
    assert list_kernels() == ["add", "layernorm", "softmax"]
    assert get_kernel("mine") is None
    kernel = register_kernel("mine", print, KernelConfig("mine", 64))
    assert get_kernel("mine") is kernel
    assert register_kernel("add", print).config == KernelConfig("add", 128, 4, 2)
    assert list_kernels() == ["add", "layernorm", "softmax", "mine"]


def test_the_functions_take_their_kernel_at_call_time(device, registry):
    x = torch.ones(300, device=device)
    assert triton_add(x, x)[0].item() == 2
    mine = InterpretedFunction(lambda x, y, out, n: out.copy_(x * 10 + y + n))
    register_kernel("add", mine, KernelConfig("add", 64, 2, 1))
    assert triton_add(x, x).tolist() == [311.0] * 300
    assert mine.launches == [((5,), {"BLOCK_SIZE": 64, "num_warps": 2, "num_stages": 1})]
    compiled = torch.compile(lambda x: triton_add(x, x), backend="aot_eager", fullgraph=True)
    assert compiled(x)[0].item() == 311
    register_kernel("add", InterpretedFunction(lambda x, y, out, n: out.zero_()))
    assert compiled(x)[0].item() == 0


def test_launch_gives_block_size_only_to_a_kernel_that_declares_it(registry):
    notes = []
    plain = InterpretedFunction(lambda *args: notes.append(args), ["x_ptr", "num_elements"])
    x = torch.zeros(1000)
    kernel = TritonKernel("plain", plain, KernelConfig("plain", 256))
    kernel.launch(x, 1000)
    kernel.launch(x, 1000, grid=(2, 3), num_warps=8)
    assert plain.launches == [
        ((4,), {"num_warps": 4, "num_stages": 2}),
        ((2, 3), {"num_warps": 8, "num_stages": 2}),
    ]
    assert notes[0] == (x, 1000)


def test_launch_refusals(registry, monkeypatch):
    with pytest.raises(RuntimeError, match=r"empty: kernel_func must be a @triton\.jit function"):
        TritonKernel("empty").launch(torch.zeros(1))
    with pytest.raises(RuntimeError, match="grid must be given where no argument is a tensor"):
        TritonKernel("none", InterpretedFunction(print)).launch(1)
    monkeypatch.setattr(triton_registry, "TRITON_AVAILABLE", False)
    with pytest.raises(RuntimeError, match="Triton must be installed"):
        TritonKernel("add", InterpretedFunction(print)).launch(torch.zeros(1))


def test_without_triton_it_warns_and_is_right(monkeypatch):
    monkeypatch.setattr(triton_registry, "TRITON_AVAILABLE", False)
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="triton_add: Triton is not installed"):
        assert torch.equal(triton_add(x, x), x + x)


def test_table_of_configurations():
    assert tuning_for("add", (7, 5)).config == KernelConfig("add", 128, 4, 2)
    assert tuning_for("add", (9, 0)) is TUNED["add", 80]
    assert tuning_for("add", (7, 0)) is None
    assert tuning_for("mine", (9, 0)) is None
    for (name, _), row in TUNED.items():
        assert row.config.name == name
        assert row.config.block_size & (row.config.block_size - 1) == 0
        assert row.why
    assert all(TUNED[name, 75].measured_on is None for name in ("add", "layernorm", "softmax"))


@BY_COMPILER
@pytest.mark.parametrize("element", ["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("arch", [75, 80, 90])
@pytest.mark.parametrize("one", [False, True], ids=["any", "one"])
@pytest.mark.parametrize("name", ["add", "layernorm", "softmax"])
def test_kernels_compile_for_every_architecture(name, one, arch, element):
    """one: a size of 1, which Triton makes a constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    x, number = f"*{element}", "i32"
    signature, constants = {
        "add": ({"x_ptr": x, "y_ptr": x, "out_ptr": x, "num_elements": number}, {}),
        "layernorm": (
            {"x_ptr": x, "weight_ptr": x, "out_ptr": x, "width": number, "eps": "fp32"},
            {"bias_ptr": None},
        ),
        "softmax": ({"x_ptr": x, "out_ptr": x, "size": number, "inner": number}, {}),
    }[name]
    constants |= {"BLOCK_SIZE": 1 if one else 128}
    if one:
        sizes = {"num_elements", "width", "size", "inner"} & signature.keys()
        constants |= dict.fromkeys(sizes, 1)
    function = get_kernel(name).kernel_func
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {key: signature[key] for key in function.arg_names}
    source = ASTSource(function, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert f"sm_{arch}" in compiled.asm["ptx"]
