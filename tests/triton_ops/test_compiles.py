"""Kernels that Triton's interpreter reads as Python are compiled for a GPU too, without one."""

from __future__ import annotations

import re

import pytest
from interpreter import INTERPRETED

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llamatelemetry.triton_ops.kernels.gemm import linear_kernel
from llamatelemetry.triton_ops.kernels.persistent_gemm import persistent_linear_kernel
from llamatelemetry.triton_ops.kernels.quantize import quantize_kernel
from llamatelemetry.triton_ops.kernels.stream_gemm import stream_linear_kernel

pytestmark = [
    pytest.mark.without_triton,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]
SIZES = {"m": "i32", "n": "i32", "k": "i32", "x_stride": "i32", "weight_stride": "i32"}
SCALES = {"x_scales_ptr": "*fp32", "weight_scales_ptr": "*fp32", "out_ptr": "*bf16"}
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 8, "ACTIVATION": None}
EVEN = {"EVEN_M": True, "EVEN_N": True, "EVEN_K": True, "SPLITS": 1}


def compiled(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2})


@pytest.mark.parametrize(
    ("precision", "kind", "block"),
    [("tf32", "bf16", 0), ("int8", "i8", 0), ("fp8", "fp8e4nv", 0), ("fp8", "fp8e4nv", 128)],
)
def test_linear_layers(precision, kind, block):
    constants = TILE | {"PRECISION": precision, "bias_ptr": None, "SCALE_BLOCK": block}
    pointers = {"x_ptr": f"*{kind}", "weight_ptr": f"*{kind}"}
    assert "mma" in compiled(linear_kernel, SIZES | SCALES | pointers, constants | EVEN).asm["ptx"]
    tiles = dict.fromkeys(("x_desc", "weight_desc"), f"tensordesc<{kind}[64, 128]>")
    types = {name: SIZES[name] for name in "mnk"} | SCALES | tiles
    assert "cp.async.bulk" in compiled(persistent_linear_kernel, types, constants).asm["ptx"]
    if not block:  # what programs leave each other is told of by atomic writes and reads
        types |= {"parts_ptr": "*fp32", "ready_ptr": "*i32"}
        ptx = compiled(stream_linear_kernel, types, constants).asm["ptx"]
        assert "acquire" in ptx
        assert re.search(r"atom\.\S*release", ptx)


@pytest.mark.parametrize("kind", ["i8", "fp8e4nv"])
def test_rows_that_a_norm_quantises(kind):
    numbers = {"x_stride": "i32", "residual_stride": "i32", "width": "i32"}
    numbers |= {"eps": "fp32", "weight_offset": "fp32", "scales_ptr": "*fp32"}
    tensors = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr"), "*bf16")
    constants = {"SOURCE": "rms_norm", "HAS_OFFSET": False, "GROUP": 128, "BLOCK": 1024}
    types = numbers | tensors | {"q_ptr": f"*{kind}"}
    ptx = compiled(quantize_kernel, types, constants | {"IS_DEPENDENT": True}).asm["ptx"]
    assert "griddepcontrol" in ptx
