"""CUDA graphs, Triton kernels and tensor cores: the names are loaded when they are first used."""

from typing import TYPE_CHECKING

from llamatelemetry._lazy import lazy_names

if TYPE_CHECKING:
    from llamatelemetry.cuda.graphs import CUDAGraph as CUDAGraph
    from llamatelemetry.cuda.graphs import GraphCaptureConfig as GraphCaptureConfig
    from llamatelemetry.cuda.graphs import GraphPool as GraphPool
    from llamatelemetry.cuda.graphs import capture_graph as capture_graph
    from llamatelemetry.cuda.graphs import disable_cuda_graphs as disable_cuda_graphs
    from llamatelemetry.cuda.graphs import enable_cuda_graphs as enable_cuda_graphs
    from llamatelemetry.cuda.graphs import replay_graph as replay_graph
    from llamatelemetry.cuda.products import gemm as gemm
    from llamatelemetry.cuda.products import tensor_core_gemm as tensor_core_gemm
    from llamatelemetry.cuda.products import tensor_core_gemm_int8 as tensor_core_gemm_int8
    from llamatelemetry.cuda.tensor_core import TensorCoreConfig as TensorCoreConfig
    from llamatelemetry.cuda.tensor_core import TensorCoreMatMul as TensorCoreMatMul
    from llamatelemetry.cuda.tensor_core import (
        check_tensor_core_support as check_tensor_core_support,
    )
    from llamatelemetry.cuda.tensor_core import enable_amp as enable_amp
    from llamatelemetry.cuda.tensor_core import enable_tensor_cores as enable_tensor_cores
    from llamatelemetry.cuda.tensor_core import get_tensor_core_info as get_tensor_core_info
    from llamatelemetry.cuda.tensor_core import matmul_tensor_core as matmul_tensor_core
    from llamatelemetry.cuda.tensor_core import (
        optimize_for_tensor_cores as optimize_for_tensor_cores,
    )
    from llamatelemetry.cuda.triton_kernels import TRITON_AVAILABLE as TRITON_AVAILABLE
    from llamatelemetry.cuda.triton_kernels import KernelConfig as KernelConfig
    from llamatelemetry.cuda.triton_kernels import TritonKernel as TritonKernel
    from llamatelemetry.cuda.triton_kernels import get_kernel as get_kernel
    from llamatelemetry.cuda.triton_kernels import list_kernels as list_kernels
    from llamatelemetry.cuda.triton_kernels import register_kernel as register_kernel
    from llamatelemetry.cuda.triton_kernels import triton_add as triton_add
    from llamatelemetry.cuda.triton_kernels import triton_layernorm as triton_layernorm
    from llamatelemetry.cuda.triton_kernels import triton_softmax as triton_softmax

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "graphs": (
            "CUDAGraph",
            "GraphCaptureConfig",
            "GraphPool",
            "capture_graph",
            "disable_cuda_graphs",
            "enable_cuda_graphs",
            "replay_graph",
        ),
        "triton_kernels": (
            "TRITON_AVAILABLE",
            "KernelConfig",
            "TritonKernel",
            "get_kernel",
            "list_kernels",
            "register_kernel",
            "triton_add",
            "triton_layernorm",
            "triton_softmax",
        ),
        "products": ("gemm", "tensor_core_gemm", "tensor_core_gemm_int8"),
        "tensor_core": (
            "TensorCoreConfig",
            "TensorCoreMatMul",
            "check_tensor_core_support",
            "enable_amp",
            "enable_tensor_cores",
            "get_tensor_core_info",
            "matmul_tensor_core",
            "optimize_for_tensor_cores",
        ),
    },
)
