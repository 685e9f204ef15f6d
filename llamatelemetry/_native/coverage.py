"""Which GPUs this build has kernels for, and what serves the others."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from llamatelemetry import machine
from llamatelemetry._native import library

# The ops that llamatelemetry/triton_ops has too, which a patched model and the engine call there,
# and what of an op they serve where that is not all of it.
TRITON_OPS = {
    "advance_step_": "",
    "append_kv_": "caches of 16 or 32 bits",
    "flash_attn_varlen": "",
    "fused_add_rms_norm_": "",
    "fused_add_rms_norm_quantize_": "",
    "gelu_and_mul": "",
    "gelu_tanh_and_mul": "",
    "layer_norm": "",
    "linear": "",
    "paged_attention": "caches of 16 or 32 bits",
    "quant_linear": "U4, S4, S8",  # as triton_ops.group_gemm.FORMATS
    "quantize_rows": "",
    "rms_norm": "",
    "rms_norm_quantize": "",
    "rope_append_kv_": "caches of 16 or 32 bits",
    "rotary_embedding_": "",
    "sample": "",
    "scaled_linear": "k a multiple of 16",
    "silu_and_mul": "",
    "silu_and_mul_quantize": "",
    "slot_mapping": "",
}


def cuda_code(capability: str, archs: list[str]) -> str | None:
    """What of archs runs on a GPU of capability, e.g. sm_80 on 8.6; None when nothing does."""
    major, minor = map(int, capability.split("."))
    built = [(int(a.split(".")[0]), int(a.removesuffix("+PTX").split(".")[1])) for a in archs]
    native = [arch for arch in built if arch[0] == major and arch[1] <= minor]
    if native:
        return "sm_{}{}".format(*max(native))
    ptx = [arch for arch, text in zip(built, archs, strict=True) if text.endswith("+PTX")]
    usable = [arch for arch in ptx if arch <= (major, minor)]
    return "PTX {}.{}, compiled by the driver at first use".format(*max(usable)) if usable else None


def cuda_archs() -> list[str]:
    """The architectures that this build's CUDA kernels are compiled for."""
    return list(library.build_info("CUDA_ARCHS", []))


def why_no_build(index: int) -> str | None:
    """Why this build has no kernels for a GPU that torch can use; None where it has.

    Args:
        index: torch's number of the GPU.
    """
    if reason := library.why_no_cuda_library():
        return reason
    capability = machine.gpus()[index]["capability"]
    if cuda_code(capability, cuda_archs()) is not None:
        return None
    archs = ", ".join(cuda_archs())
    return f"the GPU has compute capability {capability}, this build holds {archs}"


def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def backend_for(device: Any) -> tuple[str, str | None]:
    """The backend that serves a device where nobody asked for one.

    Args:
        device: a torch.device.

    Returns:
        "native" and None; or "triton" and why: a GPU that this build has no kernels for, where
        Triton is installed.
    """
    if device.type != "cuda" or not has_triton():
        return "native", None
    import torch

    index = torch.cuda.current_device() if device.index is None else device.index
    reason = why_no_build(index)
    return ("native", None) if reason is None else ("triton", reason)
