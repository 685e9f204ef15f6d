"""The public names of llamatelemetry.cuda: where they are, their signatures and defaults."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from api_names import assert_fields, assert_signature, rows

import llamatelemetry.cuda as package

# module -> name -> (parameter, default) pairs in order; a parameter alone has no default.
FUNCTIONS = {
    "graphs": {
        "CUDAGraph": [("config", None)],
        "CUDAGraph.capture": [("func", None), ("inputs", None), ("warmup", True)],
        "CUDAGraph.replay": ["**inputs"],
        "CUDAGraph.update_inputs": ["**inputs"],
        "CUDAGraph.is_captured": [],
        "CUDAGraph.reset": [],
        "GraphPool": [],
        "GraphPool.capture": ["name", "func", ("inputs", None), ("config", None)],
        "GraphPool.replay": ["name", "**inputs"],
        "GraphPool.get": ["name"],
        "GraphPool.remove": ["name"],
        "GraphPool.clear": [],
        "GraphPool.list_graphs": [],
        "capture_graph": ["func", ("inputs", None), ("warmup_iters", 3)],
        "replay_graph": ["graph"],
        "enable_cuda_graphs": ["model"],
        "disable_cuda_graphs": ["model"],
    },
    "triton_kernels": {
        "TritonKernel": ["name", ("kernel_func", None), ("config", None)],
        "TritonKernel.launch": ["*args", ("grid", None), "**kwargs"],
        "register_kernel": ["name", "kernel_func", ("config", None)],
        "get_kernel": ["name"],
        "list_kernels": [],
        "triton_add": ["x", "y"],
        "triton_layernorm": ["x", ("weight", None), ("bias", None), ("eps", 1e-5)],
        "triton_softmax": ["x", ("dim", -1)],
    },
    "products": {
        "gemm": [
            *("a", "b", ("alpha", 1.0), ("beta", 0.0), ("trans_a", False), ("trans_b", False)),
            ("c", None),
        ],
        "tensor_core_gemm": [
            *("a", "b", ("alpha", 1.0), ("beta", 0.0), ("trans_a", False), ("trans_b", False)),
            ("c", None),
        ],
        "tensor_core_gemm_int8": ["a", "b", ("trans_a", False), ("trans_b", False)],
    },
    "tensor_core": {
        "check_tensor_core_support": [("device", 0)],
        "enable_tensor_cores": [("dtype", torch.float16), ("allow_tf32", True)],
        "matmul_tensor_core": ["A", "B", ("out", None), ("dtype", torch.float16)],
        "TensorCoreMatMul": [("dtype", torch.float16)],
        "TensorCoreMatMul.forward": ["A", "B"],
        "enable_amp": [("dtype", torch.float16), ("cache_enabled", True)],
        "optimize_for_tensor_cores": ["model", ("dtype", torch.float16)],
        "get_tensor_core_info": [("device", 0)],
    },
}
DATACLASSES = {
    "graphs": {
        "GraphCaptureConfig": [
            ("pool", None),
            ("capture_error_mode", "thread_local"),
            ("warmup_iters", 3),
        ]
    },
    "triton_kernels": {
        "KernelConfig": ["name", ("block_size", 128), ("num_warps", 4), ("num_stages", 2)]
    },
    "tensor_core": {
        "TensorCoreConfig": [
            ("enabled", True),
            ("dtype", torch.float16),
            ("allow_tf32", True),
            ("allow_fp16", True),
        ]
    },
}


@pytest.mark.parametrize(("module", "name", "want"), rows(FUNCTIONS))
def test_signatures(module, name, want):
    assert_signature(package, module, name, want)


@pytest.mark.parametrize(("module", "name", "want"), rows(DATACLASSES))
def test_dataclasses(module, name, want):
    assert_fields(package, module, name, want)


def test_every_public_name_is_in_a_table():
    tables = [*FUNCTIONS.values(), *DATACLASSES.values()]
    names = {name for table in tables for name in table if "." not in name}
    assert set(package.__all__) == names | {"TRITON_AVAILABLE"}
    assert set(package.__all__) <= set(dir(package))
    assert isinstance(package.TRITON_AVAILABLE, bool)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_the_package_loads_none_of_its_modules():
    code = (
        "import sys, llamatelemetry.cuda\n"
        "print([m for m in sys.modules if m.startswith(('llamatelemetry.cuda.', 'triton.'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
