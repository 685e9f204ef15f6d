"""The only place that times anything: equal results first, then all contestants side by side.

    def cases(device, quick):                     # benchmarks/bench_<name>.py
        yield Case("8192x8192 bfloat16", inputs=(x, weight), ours=ours, baselines={"torch": theirs},
                   bytes_moved=...)
    if __name__ == "__main__":
        main("<name>", cases)

Ours, each baseline and the limit (torch's reading and writing on the GPU, reading on the CPU, its
matmul for flops) take turns, so that a machine that changes speed changes it for all; "x" and "% of
the limit" are medians of the ratios within a round. Inputs rotate through copies larger than the
last cache. On the GPU a sample is one replay of a CUDA graph of many calls between two events.
Results go to benchmarks/results/<name>-<cpu|cuda>.json: the environment and every sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llamatelemetry import machine

RESULTS = Path(__file__).parent / "results"
SAMPLE_US = 2000  # a sample repeats the call until it lasts about this long
MAX_CALLS = 200
CPU_CACHE_BYTES = 64 << 20  # a virtual machine reports its host's, so no file says
MAX_COPIES = 64  # what 64 copies do not push out of the cache stays in it, as activations do


@dataclass
class Case:
    """One row: every function takes the inputs and returns a tensor or a tuple of tensors."""

    name: str
    inputs: tuple[Any, ...]
    ours: Callable[..., Any]
    baselines: dict[str, Callable[..., Any]]
    bytes_moved: int | None = None  # read once and written once
    flops: int | None = None
    flops_dtype: torch.dtype = torch.bfloat16  # of the matmul that is the limit for flops
    check: Callable[[Any, Any], None] | None = None  # (ours, theirs); else assert_close


@dataclass
class Row:
    """A measured case. Sample i of every list was taken in round i. Times in microseconds."""

    name: str
    ours: list[float]
    baselines: dict[str, list[float]]
    limits: dict[str, list[float]] = field(default_factory=dict)  # same work at the limit's speed
    bytes_moved: int | None = None
    flops: int | None = None
    tokens: int | None = None  # of a sample

    def percentile(self, percent: int) -> float:
        return sorted(self.ours)[round((len(self.ours) - 1) * percent / 100)]

    def speedup(self, baseline: str) -> float:
        return median(b / a for a, b in zip(self.ours, self.baselines[baseline], strict=True))

    def best_baseline(self) -> str | None:
        return min(self.baselines, key=self.speedup, default=None)

    def percent_of_limit(self) -> float | None:
        pairs = [zip(self.ours, limit, strict=True) for limit in self.limits.values()]
        return max((100 * median(b / a for a, b in each) for each in pairs), default=None)

    def throughput(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens / median(self.ours) * 1e6:.0f} tok/s"
        if self.flops is not None:
            return f"{self.flops / median(self.ours) / 1e6:.1f} TFLOP/s"
        if self.bytes_moved is not None:
            return f"{self.bytes_moved / median(self.ours) / 1e3:.0f} GB/s"
        return ""


def assert_close(ours: Any, theirs: Any) -> None:
    """Every output within 2 % of the largest value: the same function, not the last bit."""
    pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (ours, theirs)), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape, f"shape {tuple(a.shape)}, theirs {tuple(b.shape)}"
        if b.numel():
            error = (a.double() - b.double()).abs().max().item()
            assert error <= 0.02 * b.double().abs().max().item(), f"results differ by {error:.3g}"


def copies_of(inputs: tuple[Any, ...], count: int) -> list[tuple[Any, ...]]:
    return [tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs) for _ in range(count)]


def rotation(inputs: tuple[Any, ...], device: torch.device) -> list[tuple[Any, ...]]:
    """Copies of the inputs that together are twice as large as the last cache."""
    cache = CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(x.nbytes for x in inputs if isinstance(x, Tensor))
    return copies_of(inputs, min(2 + 2 * cache // max(size, 1), MAX_COPIES))


def timed_us(function: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start) / 1e3


def sampler(
    function: Callable[..., Any], inputs: list[tuple[Any, ...]], device: torch.device
) -> Callable[[], float]:
    """Warms function up; the result takes one sample at each call, in microseconds."""
    turn = itertools.cycle(inputs)

    def run(calls: int) -> None:
        for _ in range(calls):
            function(*next(turn))

    def synchronized() -> None:
        run(1)
        if device.type == "cuda":
            torch.cuda.synchronize()

    synchronized()
    estimate = min(timed_us(synchronized) for _ in range(3))
    calls = int(min(max(SAMPLE_US / estimate, 1), MAX_CALLS))
    if device.type == "cpu":
        return lambda: timed_us(lambda: run(calls)) / calls

    graph, calls = torch.cuda.CUDAGraph(), max(calls, 2)
    with torch.cuda.graph(graph):
        run(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(kept: object = (function, inputs)) -> float:  # the graph reads and writes them
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    return sample


def interleave(samplers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One sample of each in turn, rounds times; each round starts with another contestant."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(samplers[name]())
    return {name: values[1:] for name, values in samples.items()}  # the first round warms up


def bandwidth_limit(nbytes: int, device: torch.device) -> tuple[str, Callable[[], float]]:
    """The time of nbytes at the speed of torch reading and writing (GPU) or only reading (CPU)."""
    if device.type == "cuda":
        source = torch.randn(1 << 28, device=device)
        target = torch.empty_like(source)
        # A kernel, as ours are: a captured copy goes to the copy engines, which are slower.
        scale = sampler(lambda: torch.mul(source, 0.5, out=target), [()], device)
        return "read + write", lambda: scale() * nbytes / (2 * source.nbytes)
    buffer = torch.randn(max(nbytes // 4, 1))
    return "read", sampler(torch.sum, rotation((buffer,), device), device)


def flops_limit(
    flops: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, Callable[[], float]]:
    """The time of flops at the speed of torch's square matmul."""
    size = 8192 if device.type == "cuda" else 1024
    if dtype == torch.int8:
        a = torch.randint(-127, 128, (size, size), dtype=dtype, device=device)
        matmul = sampler(lambda: torch._int_mm(a, a), [()], device)
    else:
        a = torch.randn(size, size, device=device).to(dtype)
        matmul = sampler(lambda: a @ a, [()], device)
    return f"matmul {str(dtype)[6:]}", lambda: matmul() * flops / (2 * size**3)


def measure(case: Case, device: torch.device, rounds: int) -> Row:
    """Asserts equal results, then times case."""
    check = case.check or assert_close
    for name, theirs in case.baselines.items():
        try:
            ours_in, theirs_in = copies_of(case.inputs, 2)
            check(case.ours(*ours_in), theirs(*theirs_in))
        except AssertionError as error:
            raise AssertionError(f"{case.name}, against {name}: {error}") from error
    limits = {}
    if case.bytes_moved is not None:
        name, limit = bandwidth_limit(case.bytes_moved, device)
        limits[name] = limit
    if case.flops is not None:
        name, limit = flops_limit(case.flops, case.flops_dtype, device)
        limits[name] = limit
    inputs = rotation(case.inputs, device)
    contestants = {
        name: sampler(function, inputs, device)
        for name, function in {"ours": case.ours, **case.baselines}.items()
    }
    samples = interleave(contestants | limits, rounds)
    return Row(
        name=case.name,
        ours=samples["ours"],
        baselines={name: samples[name] for name in case.baselines},
        limits={name: samples[name] for name in limits},
        bytes_moved=case.bytes_moved,
        flops=case.flops,
    )


def environment() -> dict[str, Any]:
    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=RESULTS.parent, capture_output=True, text=True)
        return done.stdout.strip()

    named = os.environ.get("GIT_COMMIT")  # of a copy of the tree, by who made it
    commit = named or git("rev-parse", "--short", "HEAD") or "unknown"
    changed = not named and git("status", "--porcelain", "--", "..", ":!results")
    return machine.describe() | {
        "commit": f"{commit}+changes" if changed else commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save(name: str, device: torch.device, rows: list[Row]) -> Path:
    """Writes results/<name>-<device>.json: one line a row, samples to four digits."""

    def compact(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, list):
            return [compact(v) for v in value]
        return {k: compact(v) for k, v in value.items()} if isinstance(value, dict) else value

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device.type}.json"
    lines = ",\n".join(json.dumps(compact(asdict(row))) for row in rows)
    path.write_text(
        f'{{"environment": {json.dumps(environment(), indent=1)},\n"rows": [\n{lines}\n]}}\n'
    )
    return path


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The environment and the rows that save wrote."""
    data = json.loads(path.read_text())
    return data["environment"], [Row(**row) for row in data["rows"]]


def print_rows(rows: Iterable[Row]) -> None:
    columns = ("shape", "us (p10..p90)", "throughput", "% of limit", "x best baseline")
    print("{:<40} {:>28} {:>15} {:>10}  {}".format(*columns))
    for row in rows:
        spread = f"{median(row.ours):.2f} ({row.percentile(10):.2f}..{row.percentile(90):.2f})"
        percent = row.percent_of_limit()
        share = "" if percent is None else f"{percent:.0f}"
        best = row.best_baseline()
        ratio = "" if best is None else f"{row.speedup(best):.2f} {best}"
        print(
            f"{row.name:<40} {spread:>28} {row.throughput():>15} {share:>10}  {ratio}", flush=True
        )


def main(name: str, cases: Callable[[torch.device, bool], Iterable[Case]]) -> None:
    """The command line of every bench file."""
    parser = argparse.ArgumentParser(description=f"benchmarks of {name}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: all present")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, no JSON")
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    if root not in Path(machine.__file__).resolve().parents:
        parser.error(
            f"llamatelemetry is {machine.__file__}, not this tree's; set PYTHONPATH={root}"
        )
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in map(torch.device, [arguments.device] if arguments.device else present):
        torch.manual_seed(0)
        with torch.inference_mode():
            rows = [
                measure(case, device, rounds=3 if arguments.quick else 30)
                for case in cases(device, arguments.quick)
            ]
        print(f"{name} on {device}: {machine.cpu_name() if device.type == 'cpu' else ''}")
        print_rows(rows)
        if not arguments.quick:
            print(f"wrote {save(name, device, rows)}")
