"""The implementations of flash_attn that this build has, and why one cannot serve a call."""

from __future__ import annotations

import ctypes

import torch

from llamatelemetry._native import library

_impl_name = library.cpu_library.lt_flash_impl_name
_impl_name.restype = ctypes.c_char_p


def _implementations() -> dict[str, int]:
    """Name -> number of csrc/attention/flash_choice.h, "auto" is 0."""
    names: list[str] = []
    while name := _impl_name(len(names)):
        names.append(name.decode())
    return {name: number for number, name in enumerate(names)}


FLASH_BACKENDS = _implementations()


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of csrc/common/dtype.h


def flash_why_not(backend: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve aligned tensors of dtype on its device, the CPU or the current
    GPU, or None where it can."""
    owner = library.cpu_library if backend == "cpu" else library.cuda_library
    if owner is None:
        return library.why_no_cuda_library()
    owner.lt_flash_why_not.restype = ctypes.c_char_p
    reason = owner.lt_flash_why_not(FLASH_BACKENDS[backend], _DTYPES.index(dtype))
    return reason.decode() if reason else None


def flash_choice(dtype: torch.dtype) -> str:
    """The implementation that serves aligned tensors of dtype on the current GPU, or "none"."""
    if library.cuda_library is None:
        return "none"
    library.cuda_library.lt_flash_choice.restype = ctypes.c_char_p
    name = library.cuda_library.lt_flash_choice(_DTYPES.index(dtype)).decode()
    return "none" if name == "auto" else name


def flash_backend_number(op: str, backend: str | None) -> int:
    if backend is None:
        return 0
    if backend not in FLASH_BACKENDS:
        raise RuntimeError(
            f"{op}: backend must be None or one of {', '.join(FLASH_BACKENDS)}, got {backend!r}"
        )
    return FLASH_BACKENDS[backend]
