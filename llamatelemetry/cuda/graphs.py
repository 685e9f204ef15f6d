"""CUDA graphs: single ones, pools of them that share memory, and a model's forward as graphs."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from llamatelemetry.cuda.capture import CUDAGraph, GraphCaptureConfig
from llamatelemetry.cuda.devices import device_of
from llamatelemetry.cuda.eager_replay import copy_into
from llamatelemetry.cuda.model_graphs import disable_cuda_graphs, enable_cuda_graphs
from llamatelemetry.inference.arguments import instance

__all__ = [
    "CUDAGraph",
    "GraphCaptureConfig",
    "GraphPool",
    "capture_graph",
    "disable_cuda_graphs",
    "enable_cuda_graphs",
    "replay_graph",
]


class GraphPool:
    """Named graphs that share one memory pool.

    The graphs use the same scratch memory, so replay them one after the other, on one stream. Their
    outputs lie outside of it: each stays valid until its own graph is replayed.

    Example:
        >>> pool = GraphPool()
        >>> pool.capture("double", lambda x: 2 * x, {"x": torch.ones(2)})
        'double'
        >>> pool.replay("double", x=torch.tensor([3.0, 4.0]))
        tensor([6., 8.])
    """

    def __init__(self) -> None:
        self._graphs: dict[str, CUDAGraph] = {}
        self._handle: Any = None

    def capture(
        self,
        name: str,
        func: Callable[..., Any],
        inputs: Mapping[str, Any] | None = None,
        config: GraphCaptureConfig | None = None,
    ) -> str:
        """Captures func under a name; a graph that has the name already is freed first.

        Args:
            name: what replay, get and remove take.
            func: as in CUDAGraph.capture.
            inputs: as in CUDAGraph.capture.
            config: how to capture; where it names a memory pool, that one is used. There is at
                least one warm-up, from which the outputs get their memory.

        Returns:
            name.
        """
        if name in self._graphs:
            self._graphs[name].reset()
        config = GraphCaptureConfig() if config is None else config
        instance("GraphPool.capture: config", config, GraphCaptureConfig, "a GraphCaptureConfig")
        if config.pool is None:
            config = dataclasses.replace(config, pool=self._pool())
        if device_of(func, inputs).type == "cuda":
            config = dataclasses.replace(config, warmup_iters=max(config.warmup_iters, 1))
            func = _with_own_outputs(func)
        graph = CUDAGraph(config)
        try:
            graph.capture(func, inputs)
        except BaseException:
            self._graphs.pop(name, None)
            raise
        self._graphs[name] = graph
        return name

    def replay(self, name: str, **inputs: Any) -> Any:
        """Replays a graph; inputs as in CUDAGraph.replay.

        Raises:
            KeyError: no graph has this name.
        """
        if name not in self._graphs:
            raise KeyError(f"GraphPool: name must be one of {self.list_graphs()}, got {name!r}")
        return self._graphs[name].replay(**inputs)

    def get(self, name: str) -> CUDAGraph | None:
        """The graph of this name, or None."""
        return self._graphs.get(name)

    def remove(self, name: str) -> None:
        """Frees a graph; an unknown name is no error."""
        graph = self._graphs.pop(name, None)
        if graph is not None:
            graph.reset()

    def clear(self) -> None:
        """Frees all graphs and gives their memory back to the device."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._handle = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            gc.collect()  # results in reference cycles hold blocks of the pool
            torch.cuda.empty_cache()

    def list_graphs(self) -> list[str]:
        """The names, in the order in which they were first captured."""
        return list(self._graphs)

    def _pool(self) -> Any:
        """The shared pool's handle; torch ends a pool with its last graph, so then a new one."""
        if not torch.cuda.is_available():
            return None
        if self._handle is None or not any(g.is_captured() for g in self._graphs.values()):
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle


def _with_own_outputs(func: Callable[..., Any]) -> Callable[..., Any]:
    """func, with results in tensors that its first call allocates.

    A later graph may put its outputs where an earlier one has its scratch memory, so that a replay
    of the earlier one would overwrite them.
    """
    kept: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        with torch.no_grad():
            if not kept:
                kept.append(pytree.tree_map_only(torch.Tensor, torch.empty_like, result))
            if not copy_into(kept[0], result):
                raise RuntimeError("GraphPool: func must return the same shapes at every call")
        return kept[0]

    call.__wrapped__ = func  # type: ignore[attr-defined]  # its signature and its tensors
    return call


def capture_graph(
    func: Callable[..., Any], inputs: Mapping[str, Any] | None = None, warmup_iters: int = 3
) -> CUDAGraph:
    """Captures func; see CUDAGraph.capture.

    Args:
        func: called as ``func(**inputs)`` or ``func()``.
        inputs: name -> tensor, the buffers that every replay reads.
        warmup_iters: how often func runs before it is captured.

    Returns:
        The captured graph.

    Example:
        >>> graph = capture_graph(lambda x: x + 1, {"x": torch.zeros(2)})
        >>> graph.replay(x=torch.ones(2))
        tensor([2., 2.])
    """
    graph = CUDAGraph(GraphCaptureConfig(warmup_iters=warmup_iters))
    graph.capture(func, inputs)
    return graph


def replay_graph(graph: CUDAGraph) -> Any:
    """Replays a graph and returns what the captured function returned.

    Example:
        >>> replay_graph(capture_graph(lambda x: x + 1, {"x": torch.zeros(2)}))
        tensor([1., 1.])
    """
    instance("replay_graph: graph", graph, CUDAGraph, "a CUDAGraph")
    return graph.replay()
