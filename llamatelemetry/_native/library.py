"""Finds and loads the two libraries; explains a failure with its cause and the way out.

Importing this module loads nothing: ``cpu_library`` and ``cuda_library`` do when they are first
read, and raise the ImportError that why_no_library() only says.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

_FOLDER = Path(__file__).parents[1] / "lib"
_REBUILD = "reinstall with: pip install --no-build-isolation --force-reinstall --no-deps ."
_ELF_MACHINES = {3: "i386", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
# The oldest driver of each CUDA (docs.nvidia.com/deploy/cuda-compatibility, minor versions).
_DRIVERS = {12: "525", 13: "580"}

if TYPE_CHECKING:
    cpu_library: ctypes.CDLL
    cuda_library: ctypes.CDLL | None


def library_path(name: str) -> Path:
    """The file of a library, name being "cpu" or "cuda"; it may not exist."""
    return _FOLDER / f"libllamatelemetry_{name}.so"


def build_info(name: str, default: Any) -> Any:
    """CUDA_ARCHS, CPU_ISA_LEVELS or CUDA_VERSION of the build, default where none was made."""
    try:
        from llamatelemetry import _build_info
    except ImportError:
        return default
    return getattr(_build_info, name, default)


def _other_platform(path: Path) -> str | None:
    """That a library is of another kind of machine, which the loader calls "cannot open"."""
    head = path.read_bytes()[:20] if path.exists() else b""
    if head[:4] == b"\x7fELF":
        machine = _ELF_MACHINES.get(int.from_bytes(head[18:20], "little"), "another machine")
        here = platform.machine().lower().replace("amd64", "x86_64")
        return None if machine == here else f"it is built for {machine}, this Python runs on {here}"
    return None


def _load(name: str) -> None:
    import torch

    path = library_path(name)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = _other_platform(path) or error.__cause__ or error
        raise ImportError(f"llamatelemetry: {path} does not load: {cause}; {_REBUILD}") from error


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver serves, None without a driver."""
    number = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if status == 0 else None


def why_old_driver() -> str | None:
    """That the driver is older than the CUDA of this build's kernels or of torch, else None."""
    import torch

    if (serves := driver_cuda()) is None:
        return None
    ours = build_info("CUDA_VERSION", None) if library_path("cuda").exists() else None
    for owner, text in (("torch", torch.version.cuda), ("llamatelemetry", ours)):
        major = int(text.partition(".")[0]) if text else 0
        if serves[0] < major:
            newer = f"{_DRIVERS[major]} or newer" if major in _DRIVERS else "a newer one"
            return (
                f"the NVIDIA driver serves CUDA up to {serves[0]}.{serves[1]} and {owner} is "
                f"built for {text}; update the driver to {newer}"
            )
    return None


@cache
def _why_no_cuda_kernels() -> str | None:
    """The reason not to load the CUDA library, or that it failed to load."""
    import torch

    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not library_path("cuda").exists():
        return f"llamatelemetry is built without CUDA; put nvcc on PATH and {_REBUILD}"
    if reason := why_old_driver():
        return reason
    try:
        _load("cuda")
    except ImportError as error:
        return str(error).removeprefix("llamatelemetry: ")
    return None


def why_no_cuda_library() -> str | None:
    """Why the CUDA kernels are not registered, or None when they are. Needs no GPU."""
    load_libraries()
    return _why_no_cuda_kernels()


@cache
def load_libraries() -> ctypes.CDLL:
    """Loads what this torch can use, once.

    Returns:
        The CPU library, whose C functions Python calls.

    Raises:
        ImportError: torch is too old, or the CPU library is missing, broken, of another platform,
            or LLAMATELEMETRY_CPU_ISA asks for what is not there; with the way out. A CUDA library
            that does not load is said by the first CUDA call.
    """
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise ImportError(f"llamatelemetry needs torch >= 2.10, got {torch.__version__}")
    if not library_path("cpu").exists():
        raise ImportError(f"llamatelemetry: {library_path('cpu')} is missing; {_REBUILD}")
    _load("cpu")
    cpu = ctypes.CDLL(str(library_path("cpu")))
    cpu.lt_cpu_isa.restype = ctypes.c_char_p
    forced = os.environ.get("LLAMATELEMETRY_CPU_ISA")
    if forced and forced != cpu.lt_cpu_isa().decode():
        raise ImportError(
            "llamatelemetry: LLAMATELEMETRY_CPU_ISA must be scalar, avx2, avx512, avx512bf16 or "
            f"amx, and no more than this CPU has ({cpu.lt_cpu_isa().decode()}), got {forced!r}"
        )
    _why_no_cuda_kernels()
    return cpu


def why_no_library() -> str | None:
    """Why no op can run, a torch that does not load included, or None where the ops are loaded."""
    try:
        load_libraries()
    except ImportError as error:
        return str(error).removeprefix("llamatelemetry: ")
    except OSError as error:  # torch's own libraries do not load
        return f"torch does not import: {error}"
    return None


@cache
def _cuda_library() -> ctypes.CDLL | None:
    return None if why_no_cuda_library() else ctypes.CDLL(str(library_path("cuda")))


def __getattr__(name: str) -> Any:
    if name == "cpu_library":
        return load_libraries()
    if name == "cuda_library":
        return _cuda_library()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def cpu_isa() -> str:
    """The level of the CPU kernels: scalar, avx2, avx512, avx512bf16 or amx."""
    return load_libraries().lt_cpu_isa().decode()


def lower_cpu_isas() -> list[str]:
    """The levels below cpu_isa() that LLAMATELEMETRY_CPU_ISA can choose here."""
    levels: list[str] = build_info("CPU_ISA_LEVELS", [])
    return levels[: levels.index(cpu_isa())]
