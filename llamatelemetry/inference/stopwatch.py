"""How long the work of a device takes, without waiting for it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Begins with what the device's current stream is given from now on; on the CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self._mark()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record(torch.cuda.current_stream(self._device))
            self._marks.append(mark)
        else:
            self._times.append(time.perf_counter())

    def stop(self) -> None:
        """Ends with what the stream has been given by now."""
        self._mark()

    def is_over(self) -> bool:
        """Whether the work between is done; stop comes before."""
        return all(mark.query() for mark in self._marks)

    def wait(self) -> None:
        """Until it is."""
        for mark in self._marks[1:]:
            mark.synchronize()

    def seconds(self) -> float:
        """How long it took, once it is over."""
        if self._marks:
            begin, end = self._marks
            return begin.elapsed_time(end) / 1e3
        return self._times[1] - self._times[0]
