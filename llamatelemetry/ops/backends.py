"""The implementations of attention in this build, which one is chosen, and why one cannot serve."""

from __future__ import annotations

import ctypes

import torch

from llamatelemetry._native import library

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of csrc/common/dtype.h
# capability (0: this machine), dtype, head_dim, seqlen_q, seqlen_k, page_size
_CALL = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 4]
_HEAD_DIM = 128
_SEQLEN = 2048
# (seqlen_q, page_size) of a typical call of each op; page_size 0 is dense.
_TYPICAL = {
    "flash_attn": (_SEQLEN, 0),
    "flash_attn_varlen": (_SEQLEN, 0),
    "paged_attention": (1, 16),
}
ATTENTION_OPS = tuple(_TYPICAL)


def _library_of(backend: str) -> ctypes.CDLL | None:
    return library.cpu_library if backend == "cpu" else library.cuda_library


def flash_why_not(
    backend: str, dtype: torch.dtype, *, page_size: int = 0, capability: int = 0
) -> str | None:
    """Why a backend cannot serve aligned tensors of dtype on its device.

    Args:
        backend: One of ATTENTION_BACKENDS; its device is the CPU or the current GPU.
        dtype: torch.float32, torch.float16 or torch.bfloat16.
        page_size: Tokens of a page of the cache; 0 where keys are dense.
        capability: As in attention_choice.

    Returns:
        The reason, or None where it can.
    """
    owner = _library_of("cpu" if capability else backend)
    if owner is None:
        return library.why_no_cuda_library()
    owner.lt_attention_why_not.argtypes = [ctypes.c_char_p, *_CALL]
    owner.lt_attention_why_not.restype = ctypes.c_char_p
    call = (capability, _DTYPES.index(dtype), _HEAD_DIM, _SEQLEN, _SEQLEN, page_size)
    reason = owner.lt_attention_why_not(backend.encode(), *call)
    return reason.decode() if reason else None


def attention_choice(
    op: str,
    dtype: torch.dtype,
    *,
    device: str = "cuda",
    head_dim: int = _HEAD_DIM,
    seqlen_q: int | None = None,
    seqlen_k: int = _SEQLEN,
    page_size: int | None = None,
    capability: int = 0,
) -> str:
    """What serves a call of an attention op with aligned tensors.

    Args:
        op: "flash_attn", "flash_attn_varlen" or "paged_attention".
        dtype: torch.float32, torch.float16 or torch.bfloat16.
        device: "cuda", the current GPU, or "cpu".
        head_dim: Columns of a head.
        seqlen_q: Queries of a sequence; None is what is typical of op: 1 over a cache.
        seqlen_k: Keys of a sequence.
        page_size: Tokens of a page; None is what is typical of op: 16 over a cache, else 0.
        capability: 90 asks for a GPU of compute capability 9.0 and code for it, whatever runs
            here; 0 is this machine. How large that GPU is is not asked, so "sm90" says no splits.

    Returns:
        "<backend>, <tiles>[, <n> splits]", as csrc/attention/choice.h picks them, or "none".

    Raises:
        KeyError: op is no attention op.
    """
    typical_queries, typical_page = _TYPICAL[op]
    owner = _library_of("cpu" if capability else device)
    if owner is None:
        return "none"
    owner.lt_attention_choice.argtypes = _CALL
    owner.lt_attention_choice.restype = ctypes.c_char_p
    return str(
        owner.lt_attention_choice(
            capability,
            _DTYPES.index(dtype),
            head_dim,
            typical_queries if seqlen_q is None else seqlen_q,
            seqlen_k,
            typical_page if page_size is None else page_size,
        ).decode()
    )


def flash_choice(dtype: torch.dtype) -> str:
    """The backend that serves aligned tensors of dtype on the current GPU, or "none"."""
    return attention_choice("flash_attn", dtype).partition(",")[0]
