"""Memory of the machine and of its GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device, in bytes.

    Attributes:
        device: "cpu", "cuda:0", ...
        total: what there is.
        free: what any process could still have.
        allocated: what this process uses: its resident set on the CPU, tensors on a GPU.
        reserved: what this process holds, torch's cache included; allocated on the CPU.
        peak: the most that allocated has been.

    Example:
        >>> print(DeviceMemory("cpu", 8 << 30, 4 << 30, 1 << 30, 1 << 30, 2 << 30))
        cpu: 1.00 GiB in use (peak 2.00), 4.00 of 8.00 free
    """

    device: str
    total: int
    free: int
    allocated: int
    reserved: int
    peak: int

    def __str__(self) -> str:
        gib = {name: getattr(self, name) / 2**30 for name in ("allocated", "peak", "free", "total")}
        return (
            "{device}: {allocated:.2f} GiB in use (peak {peak:.2f}), {free:.2f} of {total:.2f} free"
        ).format(device=self.device, **gib)


def check_memory() -> list[DeviceMemory]:
    """The memory of the CPU and of every GPU that torch can use.

    Returns:
        The CPU first, then the GPUs by index; the CPU's is left out where the system does not
        tell (it is read from /proc).

    Example:
        >>> [memory.device for memory in check_memory()]  # on a machine without a GPU
        ['cpu']
    """
    found = [cpu] if (cpu := _cpu()) is not None else []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            DeviceMemory(
                f"cuda:{index}",
                total,
                free,
                torch.cuda.memory_allocated(index),
                torch.cuda.memory_reserved(index),
                torch.cuda.max_memory_allocated(index),
            )
        )
    return found


def _cpu() -> DeviceMemory | None:
    machine, process = _kib_in("/proc/meminfo"), _kib_in("/proc/self/status")
    if not {"MemTotal", "MemAvailable"} <= machine.keys() or "VmRSS" not in process:
        return None
    used = process["VmRSS"]
    peak = max(process.get("VmHWM", used), used)
    return DeviceMemory("cpu", machine["MemTotal"], machine["MemAvailable"], used, used, peak)


def _kib_in(path: str) -> dict[str, int]:
    """The lines "name: number kB" of a file of /proc, in bytes."""
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    fields = [line.replace(":", " ").split() for line in lines]
    return {f[0]: int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}
