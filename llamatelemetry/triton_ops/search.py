"""Searches launches of linear_kernel: every candidate compiled, measured and held to a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.triton_ops import gemm
from llamatelemetry.triton_ops.launch import has_tma, num_multiprocessors
from llamatelemetry.triton_ops.tuning import (
    LinearConfig,
    LinearShape,
    row_of,
    start_value,
    tma_value,
)

_COLD_BYTES = 256 * 2**20  # of weights that one after another are read: more than any L2 holds
_LAUNCHES = 12  # in one graph
_SHARED_BYTES = 227 * 1024


def candidates(shape: LinearShape, multiprocessors: int, tma: bool = False) -> list[LinearConfig]:
    """Launches worth a try; the first is the start value."""
    few = shape.m <= 32
    if few:
        sizes = product((16,), (16, 32, 64), (128, 256, 512), (1, 2, 4), (4, 8), (3, 5))
    elif shape.m <= 128:
        sizes = product((32, 64), (32, 64, 128), (64, 128), (1, 2), (4,), (3, 4))
    else:
        sizes = product((64, 128, 256), (64, 128, 256), (64,), (1,), (4, 8), (3, 4))
    found = [start_value(shape, 2, multiprocessors)]
    if tma and shape.m > 256:
        found.insert(0, tma_value(shape, multiprocessors))
    for m, n, k, splits, warps, stages in sizes:
        block_m = max(m, shape.m) if few else m
        tile = (block_m + n * (2 if shape.gated else 1)) * k * 2
        sums = block_m * n * (2 if shape.gated else 1)  # a thread holds 128 of them, or they spill
        programs = -(-shape.n // n) * splits
        if tile * stages > _SHARED_BYTES or sums > 128 * 32 * warps:
            continue
        if few and (splits > 1 and programs > 4 * multiprocessors):
            continue
        if few and tile * stages < 24 * 1024:  # too little on its way to hide the memory's latency
            continue
        if not few and warps == 4 and sums > 128 * 128:
            continue
        found.append(LinearConfig(block_m, n, k, splits, 8, warps, stages))
        if tma and not few and splits == 1:
            found.append(replace(found[-1], tma=True))
    return list(dict.fromkeys(found))


class Search:
    """The search for one shape: inputs out of L2, and what must come out.

    Args:
        shape: What to tune for.
        dtype: torch.bfloat16 or torch.float16.
    """

    def __init__(self, shape: LinearShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        rows = shape.n * (2 if shape.gated else 1)
        copies = max(_COLD_BYTES // (rows * shape.k * dtype.itemsize), 1) + 1
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.x = torch.randn(shape.m, shape.k, **options)
        self.weights = [
            torch.randn(rows, shape.k, **options) / shape.k**0.5 for _ in range(min(copies, 24))
        ]
        self.activation = "silu" if shape.gated else None
        self.out = torch.empty(shape.m, shape.n, **options)
        wide = self.x.float() @ self.weights[0].float().t()
        if shape.gated:
            gate, up = wide.to(dtype).chunk(2, -1)
            wide = torch.nn.functional.silu(gate) * up
        self.exact = wide.float()

    def run(self, config: LinearConfig, weight: Tensor | None = None) -> None:
        """One launch, into out."""
        weight = self.weights[0] if weight is None else weight
        gemm.run(self.x, weight, None, self.activation, self.out, config)

    def is_right(self, config: LinearConfig) -> bool:
        """Whether a config gives what float32 gives, within a few roundings."""
        self.out.fill_(torch.nan)
        self.run(config)
        error = (self.out.float() - self.exact).norm() / self.exact.norm()
        return bool(error < 4 * torch.finfo(self.out.dtype).eps)

    def measure(self, launch: Callable[[Tensor], object]) -> float:
        """Microseconds of a launch, of a graph of several, each with weights out of L2."""
        launch(self.weights[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(_LAUNCHES):
                launch(self.weights[i % len(self.weights)])
        times = []
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(5):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / _LAUNCHES)
        return sorted(times)[1]


def compile_all(searches: Sequence[Search], multiprocessors: int, tma: bool) -> None:
    """Compiles every candidate, several at a time; what cannot be built is left to the search."""
    jobs = {
        (config, search.shape.gated): search
        for search in searches
        for config in candidates(search.shape, multiprocessors, tma)
    }

    def build(job: tuple[LinearConfig, bool]) -> None:
        try:
            jobs[job].run(job[0])
        except Exception:
            return  # of Triton's compiler, whatever it raises

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, jobs))
    torch.cuda.synchronize()


def tune(
    shapes: Sequence[LinearShape], path: Path, dtype: torch.dtype, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Finds the fastest launch of each shape and writes it; shapes that the file has are done.

    Args:
        shapes: What to tune for.
        path: Of the file that is written after each shape, so that a run can be resumed.
        dtype: torch.bfloat16 or torch.float16, whose launches serve both.
        progress: Told in a sentence how far it is.

    Yields:
        The row of each shape that was measured.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    multiprocessors = num_multiprocessors(device)
    rows = json.loads(path.read_text())["linear"] if path.exists() else []
    done = {LinearShape(**row["shape"]) for row in rows}
    waiting = [shape for shape in dict.fromkeys(shapes) if shape not in done]
    progress(f"{len(done)} shapes are done, {len(waiting)} to go")
    for i, shape in enumerate(waiting):
        search = Search(shape, dtype, device)
        compile_all([search], multiprocessors, has_tma(device))
        found: list[tuple[float, LinearConfig]] = []
        configs = candidates(shape, multiprocessors, has_tma(device))
        for config in configs:
            try:
                if search.is_right(config):
                    found.append((search.measure(partial(search.run, config)), config))
            except Exception as error:  # of Triton's compiler or the launch: no candidate
                progress(f"{config}: {type(error).__name__}")
        if not found:
            raise RuntimeError(f"tune: no launch of {shape} gives the right result")
        us, best = min(found, key=lambda pair: pair[0])
        start_us = next((t for t, config in found if config == configs[0]), None)
        progress(
            f"{i + 1} of {len(waiting)}: {shape.m} rows, {shape.n} x {shape.k}"
            f"{' gated' if shape.gated else ''}: {us:.1f} us of {len(found)} launches; the start "
            f"value took {'none' if start_us is None else f'{start_us:.1f} us'}"
        )
        rows.append(row_of(shape, "16-bit", replace(best), us))
        path.write_text(json.dumps({"measured_on": _machine(), "linear": rows}, indent=1) + "\n")
        yield rows[-1]


def _machine() -> dict[str, str]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
