"""The machine and the versions that a measurement or a bug report depends on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "transformers",
    "triton",
    "gguf",
    "llama-cpp-python",
    "xllamacpp",
    "flashinfer-python",
)


def cpu_name() -> str:
    """What the CPU calls itself, e.g. AMD EPYC."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver() -> str | None:
    """The NVIDIA driver's version, or None without one."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _torch() -> Any:
    """torch, or None where it is missing or broken: the rest can be said all the same."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def gpus() -> list[dict[str, str]]:
    """Name, compute capability and memory of every GPU that torch can use."""
    if (torch := _torch()) is None:
        return []
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory": f"{gpu.total_memory / 2**30:.0f} GiB",
            }
        )
    return found


def versions() -> dict[str, str]:
    """Installed versions of torch and of what we run beside or against."""
    torch = _torch()
    found = {
        "torch": str(torch.__version__) if torch else "none that imports",
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """All of it, ready for JSON."""
    torch = _torch()
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads() if torch else os.cpu_count(),
        "gpus": gpus(),
        "driver": driver(),
        "cuda": torch.version.cuda if torch else None,
        "versions": versions(),
    }
