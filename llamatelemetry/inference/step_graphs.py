"""CUDA graphs of one model's steps: one stream and one pool of memory for all of them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from llamatelemetry.inference.failed_capture import close_failed_capture


class StepGraphs:
    """Captures steps whose replays follow one another on one stream, so that all may have their
    activations in the same memory, and cuBLAS one workspace."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def capture(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Runs once, which warms up what the capture must not do, then captures for later runs.

        All of it under the model's own device: torch captures on a stream of the current one.

        Returns:
            What replays.

        Raises:
            RuntimeError: run launches nothing on device.
        """
        with torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
            current = torch.cuda.current_stream(device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()
            try:
                graph = self._captured(run)
            except torch.OutOfMemoryError:  # which a capture cannot make room for
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
                graph = self._captured(run)
            current.wait_stream(self._stream)
        self._graphs.add(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    def _captured(self, run: Callable[[], None]) -> Any:
        if not self._graphs:  # torch takes a pool that all graphs have left for a mistake
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self._stream):
            warnings.simplefilter("always")
            # Not torch.cuda.graph, which frees all cached memory before each capture.
            # thread_local: what other threads do meanwhile is no error of this capture.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                try:
                    run()
                except BaseException:
                    with suppress(RuntimeError):  # the step's exception says more
                        graph.capture_end()
                    raise
                graph.capture_end()
            except BaseException:
                close_failed_capture(graph, self._stream.device, self._pool)
                raise
        if any("graph is empty" in str(warning.message).lower() for warning in caught):
            raise RuntimeError(
                "DecodeStep: the graph must hold the step's kernels, got an empty one on "
                f"{self._stream.device}"
            )
        return graph
