"""What a CUDA graph's capture that failed leaves open in torch, closed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch


def close_failed_capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Frees a graph whose capture has failed, and lets torch allocate and draw as before it.

    Args:
        graph: whose capture is over, well or not.
        device: that it was on.
        pool: handle of the memory pool that it allocated from.
    """
    with suppress(RuntimeError):  # open only if the capture's end failed
        torch._C._cuda_endAllocateToPool(device.index, pool)
    graph.reset()
    _release_generator(device)


def _release_generator(device: torch.device) -> None:
    """After an end that failed torch takes its generator for captured: each torch.rand on the
    device is an error, "Offset increment outside graph capture" (torch 2.11). The next capture
    that ends well changes that, so here is one."""
    stream, x = torch.cuda.Stream(device), torch.zeros(1, device=device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        x.add_(1)
        graph.capture_end()
    graph.reset()
