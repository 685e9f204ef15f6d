"""Whose a kernel is, and the profile command's verdict on a generation's kernels."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry.cli.main import main
from llamatelemetry.profiling.kernels import KernelTime, maker_of, why_not_only

NAMES = {
    "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "cuBLAS",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16>(cublasGemvParamsEx)": "cuBLAS",
    "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8_stage3": "cuBLAS",
    "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_nn_align1>(Params)": "CUTLASS",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "cuDNN",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>()": "FlashAttention",
    "_ZN14llamatelemetry12kernel_entryINS_10QuantWgmmaI13__nv_bfloat16EEEvNT_6ParamsE": (
        "llamatelemetry"
    ),
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>()": "torch",
    "void (anonymous namespace)::elementwise_kernel_with_index<int, at::native::arange_out>()": (
        "torch"
    ),
    "void at_cuda_detail::cub::DeviceReduceSingleTileKernel<int>()": "torch",
    "memcpy32_post": "torch",
    "void (anonymous namespace)::kernel<int>()": "unknown",
    "void other::kernel<at::native::Thing>()": "unknown",
}


def kernel(name, maker):
    return KernelTime(name, maker, 1, 1.0, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_maker_of(name):
    assert maker_of(name) == NAMES[name]


def test_ours_in_triton_are_known_by_name():
    pytest.importorskip("triton")
    for name in ("linear_kernel", "attention_kernel", "rope_append_kernel", "draw_kernel"):
        assert maker_of(name) == "Triton"
    assert maker_of("another_kernel") == "unknown"


def test_why_not_only():
    ours, torch_s = kernel("linear_kernel", "Triton"), kernel("at::native::add", "torch")
    assert why_not_only("triton", [ours, torch_s]) is None
    assert why_not_only("triton", [torch_s]) == (
        "one kernel at least must be Triton's, got none of 1"
    )
    assert why_not_only("triton", [ours, kernel("nvjet_tst", "cuBLAS")]) == (
        "1 of 2 kernels must be Triton or torch's, got nvjet_tst (cuBLAS)"
    )


def test_the_command_refuses(capsys, monkeypatch):
    assert main(["profile", "--batch", "0"]) == 2
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profile", "--expect", "triton"]) == 2
    assert "kernels of a GPU that torch can use" in capsys.readouterr().err
