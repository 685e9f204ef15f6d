"""One CUDA graph: warmed up, captured and replayed on the device that its tensors are on."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.cuda.capture_inputs import call_with, check_input
from llamatelemetry.cuda.devices import device_of
from llamatelemetry.cuda.eager_replay import EagerReplay, shallow_copy
from llamatelemetry.inference.arguments import instance, integer
from llamatelemetry.inference.failed_capture import close_failed_capture

_ERROR_MODES = ("global", "thread_local", "relaxed")


@dataclass
class GraphCaptureConfig:
    """How a graph is captured.

    Attributes:
        pool: handle of the memory pool to allocate from, as torch.cuda.graph_pool_handle() gives
            it, or None for a pool of the graph's own.
        capture_error_mode: what other threads may do meanwhile: "global", "thread_local" or
            "relaxed", CUDA's cudaStreamCaptureMode.
        warmup_iters: how often the function runs before it is captured.

    Raises:
        ValueError: for another mode, and for less than no warm-up.

    Example:
        >>> GraphCaptureConfig(warmup_iters=1).capture_error_mode
        'thread_local'
    """

    pool: Any = None
    capture_error_mode: str = "thread_local"
    warmup_iters: int = 3

    def __post_init__(self) -> None:
        if self.capture_error_mode not in _ERROR_MODES:
            raise ValueError(
                f"GraphCaptureConfig: capture_error_mode must be one of {list(_ERROR_MODES)}, got "
                f"{self.capture_error_mode!r}"
            )
        if integer("GraphCaptureConfig: warmup_iters", self.warmup_iters) < 0:
            raise ValueError(
                f"GraphCaptureConfig: warmup_iters must be at least 0, got {self.warmup_iters}"
            )


class CUDAGraph:
    """A function or a block, captured once and then replayed as a whole.

    Where there is no CUDA, or all tensors that a function shows are on the CPU, the same calls run
    the work eagerly. A block shows no tensors: with CUDA it must work on the current device.

    Args:
        config: how to capture; the defaults if None.

    Example:
        >>> graph = CUDAGraph()
        >>> first = graph.capture(lambda x: 2 * x, {"x": torch.ones(2)})
        >>> graph.replay(x=torch.tensor([3.0, 4.0]))
        tensor([6., 8.])
    """

    def __init__(self, config: GraphCaptureConfig | None = None) -> None:
        self.config = GraphCaptureConfig() if config is None else config
        instance("CUDAGraph: config", self.config, GraphCaptureConfig, "a GraphCaptureConfig")
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager: EagerReplay | None = None
        self._device = torch.device("cpu")
        self._inputs: dict[str, Any] = {}
        self._result: Any = None

    def capture(
        self,
        func: Callable[..., Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        warmup: bool = True,
    ) -> Any:
        """Captures a function, or the body of a ``with`` statement.

        Args:
            func: called as ``func(**inputs)``, or as ``func()`` if it takes none of them and reads
                the tensors as variables. Warm-up, capture and a first replay run it several times.
                Without func this returns a context manager that captures its body; outputs of
                the body hold values from the first ``replay`` on. With CUDA the body must work on
                the current device, so give CPU work as func.
            inputs: name -> tensor. The tensors become the buffers that every replay reads.
            warmup: whether func runs config.warmup_iters times on a side stream first.

        Returns:
            What func returned, with the values of a first replay; later replays overwrite its
            tensors.

        Raises:
            TypeError: func takes neither the inputs nor no arguments.
            RuntimeError: nothing was captured, or func did what a graph cannot hold; the graph is
                then as if never captured, and func's own exception comes through as it is.
        """
        self.reset()
        if func is None:
            if inputs is not None:
                raise TypeError(
                    "CUDAGraph.capture: inputs must come with func, got inputs alone; a captured "
                    "block reads its tensors as variables"
                )
            return self._capture_block()
        call = call_with(func, {} if inputs is None else inputs)
        self._inputs = dict(inputs or {})
        self._device = device_of(func, self._inputs)
        if self._device.type != "cuda":
            warn_without_cuda("CUDAGraph")
            self._eager = EagerReplay(call)
            try:
                return self._eager.run()
            except BaseException:
                self.reset()
                raise
        if warmup:
            warm_up(call, self.config.warmup_iters, self._device)
        with self._capturing(self._device):
            self._result = call()
        return self.replay()

    def replay(self, **inputs: Any) -> Any:
        """Runs the captured work again, on the current stream of its device.

        Args:
            **inputs: new values for inputs of the capture, as in update_inputs.

        Returns:
            What func returned, of the same type, its tensors overwritten; None for a block.

        Raises:
            RuntimeError: nothing is captured yet.
        """
        if self._graph is None and self._eager is None:
            raise RuntimeError(
                "Graph not captured yet; call capture(func), or use `with graph.capture():`"
            )
        self.update_inputs(**inputs)
        if self._eager is not None:
            return self._eager.replay()
        assert self._graph is not None
        with torch.cuda.device(self._device):
            self._graph.replay()
        return shallow_copy(self._result)

    def update_inputs(self, **inputs: Any) -> None:
        """Copies new values into the buffers that the capture's inputs are.

        Raises:
            KeyError: a name that is no input.
            ValueError: another shape or dtype than the buffer's, or another value for an input
                that is no tensor and so is frozen.
        """
        for name, value in inputs.items():
            if name not in self._inputs:
                raise KeyError(
                    f"CUDAGraph: input must be one of {sorted(self._inputs)}, got {name!r}"
                )
            check_input(name, self._inputs[name], value)
        with torch.inference_mode():
            for name, value in inputs.items():
                if isinstance(value, Tensor) and value is not self._inputs[name]:
                    self._inputs[name].copy_(value)

    def is_captured(self) -> bool:
        """Whether there is a CUDA graph; False where the work runs eagerly."""
        return self._graph is not None

    def reset(self) -> None:
        """Frees the graph and what it keeps alive; it can capture again."""
        if self._graph is not None:
            torch.cuda.synchronize(self._device)  # a replay may still be reading its memory
            self._graph.reset()
        if self._eager is not None:
            self._eager.close()
        self._graph = self._eager = self._result = None
        self._inputs = {}

    @contextlib.contextmanager
    def _capture_block(self) -> Iterator[CUDAGraph]:
        if torch.cuda.is_available():
            self._device = torch.device("cuda", torch.cuda.current_device())
            with self._capturing(self._device):
                yield self
            return
        warn_without_cuda("CUDAGraph")
        eager = EagerReplay()
        with eager:
            yield self
        self._eager = eager

    @contextlib.contextmanager
    def _capturing(self, device: torch.device) -> Iterator[None]:
        """Captures the body under device, whatever device and stream are current."""
        graph = torch.cuda.CUDAGraph()
        pool = self.config.pool or torch.cuda.graph_pool_handle()
        stream = _capture_stream(device.index)
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what is cached can serve the graph's pool
            with torch.cuda.stream(stream), _no_collection():
                graph.capture_begin(pool, capture_error_mode=self.config.capture_error_mode)
                try:
                    try:
                        yield
                    except BaseException:
                        with contextlib.suppress(RuntimeError):  # the body's exception says more
                            graph.capture_end()
                        raise
                    _end_capture(graph, device)
                except BaseException:
                    self._result = None
                    close_failed_capture(graph, device, pool)
                    raise
        self._graph = graph


def warm_up(call: Callable[[], Any], count: int, device: torch.device) -> None:
    """Runs call count times on a side stream of device, as a capture needs it to have run."""
    with torch.cuda.device(device):
        stream, current = _capture_stream(device.index), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(count):
                call()
        current.wait_stream(stream)


def warn_without_cuda(who: str) -> None:
    """A warning that Python shows once, as it always comes from this line."""
    warnings.warn(
        f"{who}: no CUDA device holds the tensors, so the work runs eagerly on the CPU",
        stacklevel=1,
    )


@functools.cache
def _capture_stream(index: int) -> Any:
    """One side stream a device: graphs that share a pool reuse memory on the same stream only."""
    with torch.cuda.device(index):
        return torch.cuda.Stream()


def _end_capture(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph.capture_end()
    for warning in caught:
        if "graph is empty" in str(warning.message).lower():
            raise RuntimeError(
                f"CUDAGraph: the captured work must use {device}, got no work on it; capture under "
                "torch.cuda.device(...) of the tensors, and on the current stream"
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may hold another graph, and to free one during a capture spoils the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
