"""A model's forward as CUDA graphs: one for each signature of its inputs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llamatelemetry.cuda.capture import (
    CUDAGraph,
    GraphCaptureConfig,
    warm_up,
    warn_without_cuda,
)
from llamatelemetry.inference.arguments import instance
from llamatelemetry.models.forwards import StandIn, standing
from llamatelemetry.models.hf_overrides import OVERRIDES

_log = logging.getLogger("llamatelemetry")

MAX_GRAPHS = 32  # signatures of one model; more would be prompts of ever new lengths
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class NotCapturable(Exception):
    """Why a call cannot be a graph."""


def enable_cuda_graphs(model: nn.Module) -> nn.Module:
    """Replays a model's forward from CUDA graphs, one for each signature of its inputs.

    The first call with new shapes, dtypes or constants captures; later ones copy their tensors in,
    replay, and return copies of the outputs. Weights may change in place; where one has moved, all
    graphs are captured anew. Another attention implementation or enable_flash_attention is a new
    signature; after any other change to what the model computes, disable and enable. Where the
    model is patched, generate's steps are graphs too, as with optimize_kv_cache. Other calls that
    cannot be a graph (gradients, CPU tensors, caches that grow, a forward that waits for the GPU or
    writes into its inputs) run as before, and the log says once why.

    Args:
        model: changed in place; a second call changes nothing.

    Returns:
        model.

    Example:
        >>> layer = enable_cuda_graphs(torch.nn.Linear(4, 2).eval())
        >>> with torch.inference_mode():
        ...     layer(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    instance("enable_cuda_graphs: model", model, nn.Module, "a module")
    if standing(model, GraphedForward) is not None:
        return model
    if not torch.cuda.is_available():
        warn_without_cuda("enable_cuda_graphs")
    if "_llamatelemetry" in model.__dict__:  # it is patched, so transformers is imported
        from llamatelemetry.inference import model_cache

        model_cache.use(model, model_cache.CUDA_GRAPHS)
    GraphedForward(model).install()
    return model


def disable_cuda_graphs(model: nn.Module) -> nn.Module:
    """Undoes enable_cuda_graphs and frees its graphs.

    Args:
        model: changed in place; one without graphs stays as it is.

    Returns:
        model.

    Example:
        >>> layer = enable_cuda_graphs(torch.nn.Linear(4, 2).eval())
        >>> disable_cuda_graphs(layer) is layer
        True
    """
    instance("disable_cuda_graphs: model", model, nn.Module, "a module")
    graphed = standing(model, GraphedForward)
    if graphed is None:
        return model
    graphed.remove()
    if "_prepare_cache_for_generation" in model.__dict__:
        from llamatelemetry.inference import model_cache

        model_cache.leave(model, model_cache.CUDA_GRAPHS)
    return model


@dataclass
class _Entry:
    """A captured signature: the buffers that its graph reads and the graph."""

    buffers: list[Tensor]
    graph: CUDAGraph


class GraphedForward(StandIn):
    """A model's forward, replayed."""

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._entries: dict[object, _Entry | str] = {}
        self._weights: list[int] = []
        self._pool: Any = None
        self._done: Any = None
        self._reasons: set[str] = set()

    @property
    def num_graphs(self) -> int:
        """How many signatures have a graph."""
        return sum(isinstance(entry, _Entry) for entry in self._entries.values())

    def clear(self) -> None:
        """Frees all graphs; the next calls capture again."""
        with self._lock:
            for entry in self._entries.values():
                if isinstance(entry, _Entry):
                    entry.graph.reset()
            self._entries.clear()
            self._pool = self._done = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        takes = getattr(self._original, "takes", None)
        if torch.compiler.is_compiling() or (takes is not None and takes(args, kwargs)):
            return self._original(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        modules = modules_of(self._model)
        try:
            device = self._check(leaves, tensors_of(modules))
            key = signature(leaves, tree, modules)
            return self._graphed(key, leaves, tree, device)
        except NotCapturable as reason:
            if str(reason) not in self._reasons:
                self._reasons.add(str(reason))
                _log.warning("%s runs without CUDA graphs: %s", type(self._model).__name__, reason)
        return self._original(*args, **kwargs)

    def _check(self, leaves: list[Any], weights: list[Tensor]) -> torch.device:
        """The one CUDA device of the call; also drops the graphs when a weight has moved."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for leaf in leaves:
            if not isinstance(leaf, (*_CONSTANTS, Tensor)):
                raise NotCapturable(f"an input holds a {type(leaf).__name__}")
        devices = {tensor.device for tensor in (*tensors, *weights)}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            names = ", ".join(sorted(map(str, devices))) or "no device"
            raise NotCapturable(f"its tensors are on {names} and not on one CUDA device")
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *weights)):
            raise NotCapturable("gradients are enabled; use torch.inference_mode()")
        if self._model.training:
            raise NotCapturable("it is in training mode, where forwards keep state; call eval()")
        if torch.cuda.is_current_stream_capturing():
            raise NotCapturable("it is being captured as part of another graph")
        pointers = [weight.data_ptr() for weight in weights]
        if pointers != self._weights:
            self.clear()
            self._weights = pointers
        return next(iter(devices))

    def _graphed(self, key: object, leaves: list[Any], tree: Any, device: torch.device) -> Any:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with self._lock, torch.cuda.device(device), torch.no_grad():
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)  # a call on another stream may still be reading
            if key not in self._entries:
                if len(self._entries) >= MAX_GRAPHS:
                    raise NotCapturable(f"it has {MAX_GRAPHS} graphs and this signature is new")
                try:
                    self._entries[key] = self._capture(leaves, tree, device)
                except NotCapturable as reason:
                    self._entries[key] = str(reason)
            entry = self._entries[key]
            if isinstance(entry, str):
                raise NotCapturable(entry)
            for buffer, tensor in zip(entry.buffers, tensors, strict=True):
                buffer.copy_(tensor)
            out = _fresh(entry.graph.replay())
            self._done = torch.cuda.Event()
            self._done.record(stream)
            return out

    def _capture(self, leaves: list[Any], tree: Any, device: torch.device) -> _Entry:
        with torch.inference_mode(False):  # buffers that any later mode may write
            static = [torch.empty_like(x) if isinstance(x, Tensor) else x for x in leaves]
        buffers = [leaf for leaf in static if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def call() -> Any:
            args, kwargs = pytree.tree_unflatten(static, tree)
            return self._original(*args, **kwargs)

        def fill() -> None:
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor)

        fill()
        config = GraphCaptureConfig()
        warm_up(call, config.warmup_iters, device)  # errors of the forward come through here
        if any(not same_bits(b, t) for b, t in zip(buffers, tensors, strict=True)):
            raise NotCapturable("its forward writes into its inputs")
        if self._pool is None or not self.num_graphs:
            self._pool = torch.cuda.graph_pool_handle()
        graph = CUDAGraph(GraphCaptureConfig(self._pool, config.capture_error_mode))
        try:
            out = graph.capture(call, warmup=False)
        except (RuntimeError, ValueError) as error:  # ValueError: a refusal while capturing alone
            raise NotCapturable(f"the capture failed: {error}") from error
        for leaf in pytree.tree_leaves(out):
            if not isinstance(leaf, (*_CONSTANTS, Tensor)):
                graph.reset()
                raise NotCapturable(
                    f"its output holds a {type(leaf).__name__}; for a transformers model pass "
                    "use_cache=False"
                )
        return _Entry(buffers, graph)


def signature(leaves: list[Any], tree: Any, modules: list[nn.Module]) -> object:
    """Equal for calls that one graph serves: inputs, and what else decides what modules compute."""
    own = [module.__dict__ for module in modules]
    configs = {id(names["config"]): names["config"] for names in own if "config" in names}
    return (
        tuple(
            (leaf.shape, leaf.dtype, leaf.stride(), leaf.device)
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf)
            for leaf in leaves
        ),
        str(tree),
        tuple([module.training for module in modules]),
        tuple(map(type, modules)),
        tuple([names.get(OVERRIDES) for names in own]),
        tuple(getattr(config, "_attn_implementation", None) for config in configs.values()),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
    )


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules; model.modules() would spend longer on names than a replay takes."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def tensors_of(modules: list[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of modules, without those of their children."""
    groups = (group for m in modules for group in (m._parameters, m._buffers))
    return [tensor for group in groups for tensor in group.values() if tensor is not None]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def _fresh(result: Any) -> Any:
    """Copies of a result's tensors, one that occurs twice staying one."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone()
        return copies[id(leaf)]

    function: Callable[[Any], Any] = copy
    return pytree.tree_map(function, result)
