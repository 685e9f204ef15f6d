"""Finds and loads the two libraries; explains a failure with its cause and the way out."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parents[1] / "lib"
_REBUILD = "reinstall with: pip install --no-build-isolation --force-reinstall --no-deps ."


def library_path(name: str) -> Path:
    """The file of a library, name being "cpu" or "cuda"; it may not exist."""
    return _FOLDER / f"libllamatelemetry_{name}.so"


def _load(name: str) -> None:
    path = library_path(name)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = error.__cause__ or error
        raise ImportError(f"llamatelemetry: {path} does not load: {cause}; {_REBUILD}") from error


def why_no_cuda_library() -> str | None:
    """Why the CUDA kernels are not registered, or None when they are. Needs no GPU."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not library_path("cuda").exists():
        return f"llamatelemetry is built without CUDA; put nvcc on PATH and {_REBUILD}"
    return None


def load_libraries() -> ctypes.CDLL:
    """Loads what this torch can use and returns the CPU library, whose C functions Python calls."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(f"llamatelemetry needs torch >= 2.10, got {torch.__version__}")
    if not library_path("cpu").exists():
        raise ImportError(f"llamatelemetry: {library_path('cpu')} is missing; {_REBUILD}")
    _load("cpu")
    if why_no_cuda_library() is None:
        _load("cuda")
    cpu = ctypes.CDLL(str(library_path("cpu")))
    cpu.lt_cpu_isa.restype = ctypes.c_char_p
    forced = os.environ.get("LLAMATELEMETRY_CPU_ISA")
    if forced and forced != cpu.lt_cpu_isa().decode():
        raise ImportError(
            "llamatelemetry: LLAMATELEMETRY_CPU_ISA must be scalar, avx2, avx512, avx512bf16 or "
            f"amx, and no more than this CPU has ({cpu.lt_cpu_isa().decode()}), got {forced!r}"
        )
    return cpu


cpu_library = load_libraries()
cuda_library = None if why_no_cuda_library() else ctypes.CDLL(str(library_path("cuda")))


def cpu_isa() -> str:
    """The level of the CPU kernels: scalar, avx2, avx512, avx512bf16 or amx."""
    return cpu_library.lt_cpu_isa().decode()


def lower_cpu_isas() -> list[str]:
    """The levels below cpu_isa() that LLAMATELEMETRY_CPU_ISA can choose here."""
    from llamatelemetry._build_info import CPU_ISA_LEVELS

    return CPU_ISA_LEVELS[: CPU_ISA_LEVELS.index(cpu_isa())]
