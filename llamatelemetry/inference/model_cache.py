"""A model whose generate keeps keys and values in our buffers, or all in the paged cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llamatelemetry.inference.hf_cache import ContiguousLayer
from llamatelemetry.inference.kv_cache import KVCache
from llamatelemetry.inference.kv_cache_config import KVCacheConfig
from llamatelemetry.inference.packed_cache import PackedCache
from llamatelemetry.inference.packed_forward import PackedForward
from llamatelemetry.inference.packed_rows import PackedRows
from llamatelemetry.models.forwards import standing
from llamatelemetry.models.patching import why_not_forward_tokens
from llamatelemetry.models.pieces.arguments import CACHE_NAMES

# Users of PackedForward.
KV_CACHE, CUDA_GRAPHS = "optimize_kv_cache", "enable_cuda_graphs"
_METHOD = "_prepare_cache_for_generation"  # transformers' generate calls it once, for its cache


class _OwnLayer(ContiguousLayer):
    """A layer with buffers of its own, made at the first update and made again, twice as long,
    when they are full, as where a finished cache is generated on with."""

    cache: KVCache

    def __init__(self, max_length: int) -> None:
        super().__init__(None, 0)  # type: ignore[arg-type]
        self.max_length = max_length
        self.is_initialized = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length() + key_states.shape[2]
        if not self.is_initialized or length > self.max_length:
            batch = key_states.shape[0]
            self.max_length = max(length, (1 + self.is_initialized) * self.max_length)
            self._make(batch, key_states)
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.is_initialized:
            super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._select(beam_idx)

    def _batch(self) -> int:
        return super()._batch() if self.is_initialized else 0

    def _select(self, rows: Tensor) -> None:
        if len(rows) > self.cache.config.max_batch_size:
            self._make(len(rows), self.cache.keys[0].transpose(1, 2))
        super()._select(rows)

    def _make(self, batch: int, like: Tensor) -> None:
        """New buffers for so many rows with what the present ones hold."""
        cached = self.cache.get(0) if self.is_initialized else None
        config = KVCacheConfig(
            batch,
            self.max_length,
            num_layers=1,
            num_heads=like.shape[1],
            head_dim=like.shape[3],
            dtype=like.dtype,
            device=like.device,
        )
        with torch.inference_mode(False):
            self.cache = KVCache(config)
        if cached is not None:
            self.cache.update(0, *cached)
        self.is_initialized = True


def _prepare(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
    *args: Any,
    **kwargs: Any,
) -> None:
    given = [model_kwargs.get(name) for name in CACHE_NAMES]
    original = getattr(type(model), _METHOD)
    original(
        model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length,
        *args, **kwargs,
    )  # fmt: skip
    forward = standing(model, PackedForward)
    packs = forward is not None and _packs(model)
    keeps_buffers = forward is None or KV_CACHE in forward.users
    for name, before in zip(CACHE_NAMES, given, strict=True):
        cache: Any = model_kwargs.get(name)
        if isinstance(before, PackedCache) and before.rows is not None:
            before.rows.capacity = max(before.rows.capacity, max_cache_length)
        if before is not None or type(cache) is not DynamicCache or cache.offloading:
            continue
        kinds = {type(layer) for layer in cache.layers}
        if packs and not cache.layers:  # made as they are updated, all alike
            kinds = {cache.layer_class_to_replicate}
            count = model.config.get_text_config(decoder=True).num_hidden_layers
            cache.layers = [DynamicLayer() for _ in range(count)]
        if keeps_buffers:
            cache.layers = [
                _OwnLayer(max_cache_length) if type(layer) is DynamicLayer else layer
                for layer in cache.layers
            ]
        if packs and forward is not None and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            rows = PackedRows(forward.shared, max_cache_length)
            model_kwargs[name] = PackedCache(cache.layers, rows)


def _packs(model: Any) -> bool:
    """Whether the packed decoder is there to serve generate."""
    is_compiled = getattr(model, "_compiled_call_impl", None) is not None
    patched = model.__dict__.get("_llamatelemetry")
    if patched is not None and not patched.stack.is_bare_in(model):
        return False  # generate may begin with images, and go on at positions that count them
    devices = {parameter.device for parameter in model.parameters()}
    return (
        not is_compiled and len(devices) == 1 and why_not_forward_tokens(model, renew=True) is None
    )


def use(model: Any, user: str) -> None:
    """Has a model's generate run in the paged cache wherever the model is patched as a whole."""
    forward = standing(model, PackedForward)
    if forward is None:
        forward = PackedForward(model)
        forward.install()
    forward.users.add(user)
    model.__dict__[_METHOD] = partial(_prepare, model)


def leave(model: Any, user: str) -> None:
    """Undoes a user's use; with the last one's all is as it was."""
    forward = standing(model, PackedForward)
    if forward is None:
        return
    forward.users.discard(user)
    if not forward.users:
        model.__dict__.pop(_METHOD, None)
        forward.remove()


def optimize(model: Any) -> None:
    """Does what optimize_kv_cache says."""
    config = getattr(model, "config", None)
    if not hasattr(type(model), _METHOD):
        raise ValueError(
            "optimize_kv_cache: model must be a transformers model that can generate, got "
            f"{type(model).__name__}"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            "optimize_kv_cache: model must have keys and values of one width, got "
            f"{type(model).__name__} with latent attention"
        )
    use(model, KV_CACHE)


def restore(model: Any) -> None:
    """Does what restore_kv_cache says."""
    leave(model, KV_CACHE)
