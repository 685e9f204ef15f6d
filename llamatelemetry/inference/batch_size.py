"""How many sequences fit in memory together: an estimate, and a search with a model at hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from llamatelemetry.inference.arguments import instance, integer, real
from llamatelemetry.inference.context_length import GB, RESERVED_GB, bytes_per_token
from llamatelemetry.profiling.memory import check_memory
from llamatelemetry.profiling.model import arguments, device_of

_CONTEXT = 2048  # tokens of a sequence, where none are given


def suggest_batch_size(
    model_size_b: float, bits: float, available_vram_gb: float, context_length: int = _CONTEXT
) -> int:
    """The largest power of two of sequences that fit beside a model's weights, at least 1.

    Memory (GB are 1e9 bytes) is that of the weights, ``model_size_b · bits / 8`` GB, 1 GB that is
    reserved, and for each token of each sequence what get_optimal_context_length counts for it:
    its keys and values in float16, and a row of float32 logits.

    Args:
        model_size_b: Parameters in 1e9.
        bits: Of a weight: 16 for float16, 4 for Q4 formats (4.5 with their scales).
        available_vram_gb: Memory in GB, weights included.
        context_length: Tokens of each sequence.

    Returns:
        Sequences: 4 for 7B in 4 bits, and 8 for 1B, on a T4 of 16 GB. 1 also where nothing fits.

    Raises:
        ValueError: A size that is not a positive number.

    Example:
        >>> suggest_batch_size(7.0, 4, 16.0), suggest_batch_size(1.0, 16, 16.0)
        (4, 8)
    """
    op = "suggest_batch_size"
    sizes = {"model_size_b": model_size_b, "bits": bits, "available_vram_gb": available_vram_gb}
    for name, size in sizes.items():
        if not (real(f"{op}: {name}", size) > 0 and math.isfinite(size)):
            raise ValueError(f"{op}: {name} must be positive and finite, got {size!r}")
    if integer(f"{op}: context_length", context_length) < 1:
        raise ValueError(f"{op}: context_length must be at least 1, got {context_length}")
    free = (available_vram_gb - model_size_b * bits / 8 - RESERVED_GB) * GB
    fitting = free / (context_length * bytes_per_token(model_size_b))
    return 1 << max(math.floor(math.log2(fitting)), 0) if fitting > 0 else 1


@torch.inference_mode()
def search_batch_size(
    model: nn.Module,
    make_inputs: Callable[[int], Any],
    max_batch_size: int = 256,
    share: float = 0.9,
    available_bytes: int | None = None,
) -> int:
    """The largest power of two of rows whose forward stays within a share of the device's memory.

    Batches of 1, 2, 4, ... are run. The next one is not, where twice what this one needed beside
    the weights would go past the limit, so that memory does not run out on the way.

    Args:
        model: Called without gradients, in the mode (training or eval) that it is in.
        make_inputs: Batch size -> what profile_model takes as input_data, on the model's device.
        max_batch_size: Where the search ends.
        share: Of the memory that may be in use, by other processes too; 0 to 1.
        available_bytes: The memory; None: all that the device has.

    Returns:
        Rows.

    Raises:
        ValueError: An argument out of range.
        RuntimeError: One row goes past the limit, or the system does not tell its memory.

    Example:
        >>> model = torch.nn.Linear(64, 64).eval()
        >>> search_batch_size(model, lambda rows: torch.ones(rows, 64), max_batch_size=16)
        16
    """
    op = "search_batch_size"
    instance(f"{op}: model", model, nn.Module, "a module")
    if integer(f"{op}: max_batch_size", max_batch_size) < 1:
        raise ValueError(f"{op}: max_batch_size must be at least 1, got {max_batch_size}")
    if not 0 < real(f"{op}: share", share) <= 1:
        raise ValueError(f"{op}: share must be in (0, 1], got {share!r}")
    device = device_of(model, ())
    in_use, total = _in_use(device)
    limit = int(share * (total if available_bytes is None else available_bytes))
    fitting, batch = 0, 1
    while batch <= max_batch_size:
        try:
            needed = _needed_bytes(model, make_inputs(batch), device)
        except torch.OutOfMemoryError:
            break
        if in_use + needed > limit:
            break
        fitting, batch = batch, 2 * batch
        if in_use + 2 * needed > limit:
            break
    if not fitting:
        raise RuntimeError(
            f"{op}: one row must stay within {limit / GB:.3g} GB on {device}, {in_use / GB:.3g} GB "
            "of them in use before; use a smaller model or shorter inputs"
        )
    return fitting


def _in_use(device: torch.device) -> tuple[int, int]:
    """(bytes in use, all bytes) of a device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    for memory in check_memory():
        if memory.device == device.type:
            return memory.total - memory.free, memory.total
    raise RuntimeError(f"search_batch_size: the system must tell its memory, got none of {device}")


def _needed_bytes(model: nn.Module, input_data: Any, device: torch.device) -> int:
    """The most bytes at once that a forward allocates, with its inputs."""
    args, kwargs = arguments(input_data)
    given = sum(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model(*args, **kwargs)
        return given + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(*args, **kwargs)
    events = profiler.profiler.kineto_results.events()
    held = itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]")
    return given + max(held, default=0)
