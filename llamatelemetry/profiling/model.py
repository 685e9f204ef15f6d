"""A profile of a model's forward: its latency, its ops, its memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llamatelemetry.profiling.metrics import percentile


@dataclass(frozen=True)
class OpTime:
    """One op of a forward.

    Attributes:
        name: as torch's dispatcher knows it.
        calls: in one forward.
        us: its own microseconds in one forward, of the GPU where the model is on one.
        share: of all ops' time, 0 to 1.

    Example:
        >>> OpTime("aten::addmm", calls=2, us=30.0, share=0.75).us
        30.0
    """

    name: str
    calls: int
    us: float
    share: float


@dataclass(frozen=True)
class ModelProfile:
    """What profile_model measured.

    Attributes:
        device: the model's.
        latencies_ms: of each measured forward, without the profiler.
        ops: of one more forward under the profiler, the longest first.
        peak_bytes: the most GPU memory in use during the measured forwards; None on the CPU.

    Example:
        >>> ops = [OpTime("aten::addmm", 1, 900.0, 1.0)]
        >>> found = ModelProfile("cpu", [1.0, 3.0, 2.0], ops, None)
        >>> print(found.table())
        cpu: median 2.000 ms of 3 runs
        100.0%      900.0 us     1 x aten::addmm
    """

    device: str
    latencies_ms: list[float]
    ops: list[OpTime] = field(repr=False)
    peak_bytes: int | None

    @property
    def median_ms(self) -> float:
        """The median latency."""
        return percentile(self.latencies_ms, 50)

    def table(self, rows: int = 10) -> str:
        """The ops that take longest, as lines of text.

        Args:
            rows: how many.
        """
        lines = [f"{self.device}: median {self.median_ms:.3f} ms of {len(self.latencies_ms)} runs"]
        lines += [
            f"{op.share:6.1%} {op.us:10.1f} us {op.calls:5} x {op.name}" for op in self.ops[:rows]
        ]
        return "\n".join(lines)


def profile_model(
    model: nn.Module, input_data: Any, warmup: int = 3, active: int = 5
) -> ModelProfile:
    """Measures a model's forward.

    Args:
        model: called without gradients, in the mode (training or eval) that it is in.
        input_data: a mapping of keyword arguments, a tuple or list of positional ones, or the one
            argument itself.
        warmup: forwards before the measured ones.
        active: measured forwards.

    Returns:
        The profile.

    Raises:
        ValueError: warmup is negative or active is not positive.

    Example:
        >>> found = profile_model(torch.nn.Linear(8, 8), torch.ones(2, 8), warmup=1, active=3)
        >>> len(found.latencies_ms)
        3
        >>> found.ops[0].name.startswith("aten::")
        True
    """
    if warmup < 0 or active < 1:
        raise ValueError(
            f"profile_model: warmup must be >= 0 and active >= 1, got {warmup} and {active}"
        )
    args, kwargs = arguments(input_data)
    device = device_of(model, (*args, *kwargs.values()))
    with torch.no_grad():
        for _ in range(warmup):
            model(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        latencies_ms = [_timed_ms(model, args, kwargs, device) for _ in range(active)]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        ops = _ops(model, args, kwargs, device)
    return ModelProfile(str(device), latencies_ms, ops, peak)


def arguments(input_data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of profile_model's input_data."""
    if isinstance(input_data, Mapping):  # a tokenizer's BatchEncoding, too
        return (), dict(input_data)
    return (tuple(input_data) if isinstance(input_data, (tuple, list)) else (input_data,)), {}


def device_of(model: nn.Module, values: tuple[Any, ...]) -> torch.device:
    """The first GPU that a parameter, buffer or value is on; else the CPU."""
    tensors = [*model.parameters(), *model.buffers(), *values]
    devices = [t.device for t in tensors if isinstance(t, Tensor)]
    gpus = [device for device in devices if device.type == "cuda"]
    return gpus[0] if gpus else torch.device("cpu")


def _timed_ms(model: nn.Module, args: Any, kwargs: Any, device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    model(*args, **kwargs)
    _wait_for(device)
    return (time.perf_counter() - start) * 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ops(model: nn.Module, args: Any, kwargs: Any, device: torch.device) -> list[OpTime]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        model(*args, **kwargs)
        _wait_for(device)
    of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    ops = [
        (event.key, event.count, getattr(event, of))
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU and "::" in event.key  # neither kernels nor launches
    ]
    ops = [op for op in ops if op[2] > 0]
    total = sum(us for _, _, us in ops)
    found = [OpTime(name, calls, us, us / total) for name, calls, us in ops]
    return sorted(found, key=lambda op: -op.us)
