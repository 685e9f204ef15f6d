"""Searches launches: every candidate compiled, measured and held to a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from llamatelemetry.triton_ops import attention, gemm
from llamatelemetry.triton_ops.launch import has_tma, num_multiprocessors
from llamatelemetry.triton_ops.quantize import quantize_rows
from llamatelemetry.triton_ops.tuning import (
    AttentionConfig,
    LinearConfig,
    LinearShape,
    named,
    row_of,
    shared_bytes_of,
    start_value,
    tma_value,
)

KINDS = {"16-bit": torch.bfloat16, "8-bit": torch.float8_e4m3fn}  # of a linear layer's values
_COLD_BYTES = 256 * 2**20  # of weights that one after another are read: more than any L2 holds
_LAUNCHES = 12  # in one graph
_SHARED_BYTES = 227 * 1024
_FEW_ROWS, _MOST_STREAMED_ROWS = 32, 512
_HEADS, _HEADS_KV, _PROMPT = 32, 8, 4096


def candidates(
    shape: LinearShape, multiprocessors: int, tma: bool = False, bytes_of_value: int = 2
) -> list[LinearConfig]:
    """Launches worth a try; the first is the start value."""
    found = [start_value(shape, 2, multiprocessors)]
    if tma and shape.m > 128:
        found.insert(0, tma_value(shape, multiprocessors, bytes_of_value))
    if shape.m <= _FEW_ROWS:
        found += _of_few_rows(shape, multiprocessors, tma)
    elif tma:
        found += _of_descriptors(shape, bytes_of_value)
    else:
        found += _of_pointers(shape)
    if bytes_of_value == 1 and shape.m <= _FEW_ROWS:  # as many bytes on their way
        found += [replace(config, block_k=2 * config.block_k) for config in found[1:]]
    fitting = [c for c in found if shared_bytes_of(c, shape, bytes_of_value) <= _SHARED_BYTES]
    return list(dict.fromkeys(fitting))


def _of_few_rows(shape: LinearShape, multiprocessors: int, tma: bool) -> Iterator[LinearConfig]:
    for n, k, warps, stages in product((16, 32, 64), (128, 256), (4, 8), (3, 5)):
        config = LinearConfig(shape.m, n, k, 1, 8, warps, stages)
        if not 24 * 1024 <= shared_bytes_of(config, shape, 2) <= _SHARED_BYTES:
            continue  # too little on its way to hide the memory's latency, or too much
        yield config
        for splits in (2, 4):
            if -(-shape.n // n) * splits <= 4 * multiprocessors:
                yield replace(config, splits=splits)
        if tma and warps == 4 and n > 16:
            yield from (replace(config, tma=True, stream=programs) for programs in (1, 2, 3))


def _of_descriptors(shape: LinearShape, bytes_of_value: int) -> Iterator[LinearConfig]:
    """Tiles of 128 bytes of k; by pointers they were a third slower."""
    tiles = ((64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256), (256, 128))
    for (m, n), warps, stages in product(tiles, (4, 8), (3, 4)):
        sums = m * n * (2 if shape.gated else 1)  # a thread holds 128 of them, or they spill
        if m > max(shape.m, 64) or not 32 * 32 * warps <= sums <= 128 * 32 * warps:
            continue
        config = LinearConfig(m, n, 128 // bytes_of_value, 1, 8, warps, stages, tma=True)
        yield config
        if shape.m <= _MOST_STREAMED_ROWS:
            yield replace(config, stream=1)


def _of_pointers(shape: LinearShape) -> Iterator[LinearConfig]:
    if shape.m <= 128:
        sizes = product((32, 64), (32, 64, 128), (64, 128), (1, 2), (4,), (3, 4))
    else:
        sizes = product((64, 128, 256), (64, 128, 256), (64,), (1,), (4, 8), (3, 4))
    for m, n, k, splits, warps, stages in sizes:
        if m * n * (2 if shape.gated else 1) <= 128 * 32 * warps:
            yield LinearConfig(m, n, k, splits, 8, warps, stages)


def measure(run: Callable[..., object], inputs: Sequence[Any]) -> float:
    """Microseconds of a launch, of a graph of several, each with the next of inputs."""
    run(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(_LAUNCHES):
            run(inputs[i % len(inputs)])
    times = []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _LAUNCHES)
    return sorted(times)[1]


class Searched(Protocol):
    """What is tuned: its inputs, each in turn, and a launch of it."""

    @property
    def inputs(self) -> Sequence[Any]: ...
    def candidates(self) -> Sequence[Any]: ...
    def run(self, config: Any, given: Any) -> Tensor: ...
    def is_right(self, config: Any) -> bool: ...
    def row(self, config: Any, us: float) -> dict[str, Any]: ...


class LinearSearch:
    """One shape of a linear layer: weights out of L2, and what must come out."""

    def __init__(self, shape: LinearShape, kind: str, device: torch.device) -> None:
        self.shape, self.kind, self.device = shape, kind, device
        rows, dtype = shape.n * (2 if shape.gated else 1), KINDS[kind]
        copies = min(max(_COLD_BYTES // (rows * shape.k * dtype.itemsize), 1) + 1, 24)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        x = torch.randn(shape.m, shape.k, **options)
        weights = [torch.randn(rows, shape.k, **options) / shape.k**0.5 for _ in range(copies)]
        self.x = self._bytes(x)
        self.inputs = [self._bytes(weight) for weight in weights]
        self.activation = "silu" if shape.gated else None
        self.out = torch.empty(shape.m, shape.n, **options)
        wide = self._wide(self.x) @ self._wide(self.inputs[0]).t()
        if shape.gated:
            gate, up = wide.bfloat16().chunk(2, -1)
            wide = (silu(gate) * up).float()
        self.exact = wide

    def _bytes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return quantize_rows(x, KINDS[self.kind]) if self.kind == "8-bit" else (x, None)

    def _wide(self, given: tuple[Tensor, Tensor | None]) -> Tensor:
        return given[0].float() if given[1] is None else given[0].float() * given[1]

    def candidates(self) -> list[LinearConfig]:
        size, tma = KINDS[self.kind].itemsize, has_tma(self.device)
        return candidates(self.shape, num_multiprocessors(self.device), tma, size)

    def run(self, config: LinearConfig, given: tuple[Tensor, Tensor | None]) -> Tensor:
        (x, x_scales), (weight, scales) = self.x, given
        pair = None if x_scales is None or scales is None else (x_scales, scales)
        gemm.run(x, weight, None, self.activation, self.out, config, pair)
        return self.out

    def is_right(self, config: LinearConfig) -> bool:
        """Whether a config gives what float32 gives, within a few roundings."""
        self.out.fill_(torch.nan)
        self.run(config, self.inputs[0])
        error = (self.out.float() - self.exact).norm() / self.exact.norm()
        return bool(error < 4 * torch.finfo(self.out.dtype).eps)

    def row(self, config: LinearConfig, us: float) -> dict[str, Any]:
        return row_of(self.shape, self.kind, config, us)


class PrefillSearch:
    """Attention over one causal prompt of 4096 tokens, 32 heads over 8."""

    def __init__(self, head_dim: int, device: torch.device) -> None:
        self.head_dim, self.device = head_dim, device
        heads = _HEADS + 2 * _HEADS_KV
        self.inputs = [
            torch.randn(_PROMPT, heads, head_dim, device=device).bfloat16() for _ in range(3)
        ]
        self.starts = torch.tensor([0, _PROMPT], dtype=torch.int32, device=device)
        q, k, v = (x[None].transpose(1, 2) for x in self._split(self.inputs[0]))
        exact = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        self.exact = exact[0].transpose(0, 1).float()

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.split((_HEADS, _HEADS_KV, _HEADS_KV), 1)

    def candidates(self) -> list[AttentionConfig]:
        tiles = ((64, 64, 4), (128, 64, 8), (128, 128, 8))
        if not has_tma(self.device):
            return [AttentionConfig(*tile, stages) for tile, stages in product(tiles, (2, 3))]
        found = [AttentionConfig(64, 64, 4, 3, tma=True)]
        for tile, stages in product((*tiles, (64, 32, 4)), (2, 3)):
            found.append(AttentionConfig(*tile, stages, tma=True))
        return [*dict.fromkeys(found)]

    def run(self, config: AttentionConfig, given: Tensor) -> Tensor:
        scores = (self.head_dim**-0.5, True, -1, -1, 0.0)
        q, k, v = self._split(given)
        return attention.run_varlen(q, k, v, self.starts, _PROMPT, scores, None, config)

    def is_right(self, config: AttentionConfig) -> bool:
        """Whether a config gives what torch's attention gives, within a few roundings."""
        error = (self.run(config, self.inputs[0]).float() - self.exact).norm()
        return bool(error < 4 * torch.finfo(torch.bfloat16).eps * self.exact.norm())

    def row(self, config: AttentionConfig, us: float) -> dict[str, Any]:
        fields = {"head_dim": self.head_dim, "dtype": "16-bit", "config": asdict(config)}
        return fields | {"us": round(us, 2)}


def compile_all(searches: Sequence[Searched]) -> None:
    """Compiles every candidate, several at a time; what cannot be built is left to the search."""

    def build(job: tuple[Searched, Any]) -> None:
        try:
            job[0].run(job[1], job[0].inputs[0])
        except Exception:
            return  # of Triton's compiler, whatever it raises

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, [(one, config) for one in searches for config in one.candidates()]))
    torch.cuda.synchronize()


def fastest(searched: Searched, progress: Callable[[str], None]) -> tuple[list[Any], Any, float]:
    """All candidates that give the right result with their microseconds, and the best of them.

    Raises:
        RuntimeError: None does.
    """
    found: list[tuple[float, Any]] = []
    for config in searched.candidates():
        try:
            if searched.is_right(config):
                found.append((measure(partial(searched.run, config), searched.inputs), config))
        except Exception as error:  # of Triton's compiler or the launch: no candidate
            progress(f"{config}: {type(error).__name__}")
    if not found:
        raise RuntimeError("tune: no launch gives the right result")
    us, best = min(found, key=lambda pair: pair[0])
    return found, best, us


def tune(
    shapes: Sequence[LinearShape],
    head_dims: Sequence[int],
    path: Path,
    kind: str,
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Finds the fastest launch of each shape and writes it; what the file has is done.

    Args:
        shapes: Of linear layers.
        head_dims: Of attention over prompts.
        path: Of the file that is written after each, so that a run can be resumed.
        kind: "16-bit", whose launches serve bfloat16 and float16; or "8-bit", by those of e4m3.
        progress: Told in a sentence how far it is.

    Yields:
        The row of each that was measured.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    rows = json.loads(path.read_text()) if path.exists() else {}
    linear, prefill = rows.get("linear", []), rows.get("prefill", [])
    done: set[Any] = {(LinearShape(**row["shape"]), row["dtype"]) for row in linear}
    done |= {row["head_dim"] for row in prefill}
    jobs: list[tuple[Any, Callable[[], Searched], list[Any]]] = [
        ((shape, kind), partial(LinearSearch, shape, kind, device), linear)
        for shape in dict.fromkeys(shapes)
    ]
    jobs += [(n, partial(PrefillSearch, n, device), prefill) for n in dict.fromkeys(head_dims)]
    waiting = [job for job in jobs if job[0] not in done]
    progress(f"{len(jobs) - len(waiting)} are done, {len(waiting)} to go")
    for i, (key, make, of_kind) in enumerate(waiting):
        searched = make()
        compile_all([searched])
        found, best, us = fastest(searched, progress)
        start = next((t for t, config in found if config == searched.candidates()[0]), None)
        progress(
            f"{i + 1} of {len(waiting)}, {named(key)}: {us:.1f} us of {len(found)} launches; "
            f"the start value took {'none' if start is None else f'{start:.1f} us'}"
        )
        of_kind.append(searched.row(best, us))
        text = {"measured_on": _machine(), "linear": linear, "prefill": prefill}
        path.write_text(json.dumps(text, indent=1) + "\n")
        yield of_kind[-1]


def _machine() -> dict[str, str]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
