"""Key-value caches to use by hand or in transformers' generate: contiguous, and in pages."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from llamatelemetry.inference.arguments import instance, integer
from llamatelemetry.inference.kv_cache_config import (
    EIGHT_BIT,
    KVCacheConfig,
    ServesTransformers,
    kv_cache_bytes,
)
from llamatelemetry.inference.paged_kv_cache import PagedKVCache
from llamatelemetry.ops import append_kv_, slot_mapping
from llamatelemetry.ops._contract import inference_only

__all__ = [
    "KVCache",
    "KVCacheConfig",
    "PagedKVCache",
    "kv_cache_bytes",
    "optimize_kv_cache",
    "restore_kv_cache",
]

_Model = TypeVar("_Model", bound=torch.nn.Module)


class KVCache(ServesTransformers):
    """Preallocated keys and values of a batch of sequences, all of one length.

    Attributes:
        keys, values: [num_layers, max_batch_size, max_seq_length, num_kv_heads, head_dim].

    Example:
        >>> sizes = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "dtype": torch.float32}
        >>> cache = KVCache(KVCacheConfig(max_batch_size=1, max_seq_length=16, **sizes))
        >>> keys, values = cache.update(0, torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8))
        >>> keys, values = cache.update(0, torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8))
        >>> keys.shape
        torch.Size([1, 4, 2, 8])
    """

    def __init__(self, config: KVCacheConfig) -> None:
        instance("KVCache: config", config, KVCacheConfig, "a KVCacheConfig")
        if config.dtype in EIGHT_BIT:
            raise ValueError(
                f"KVCache: dtype must be one without scales, got {config.dtype}; PagedKVCache "
                "keeps 8 bits"
            )
        self.config = config
        shape = (
            config.num_layers,
            config.max_batch_size,
            config.max_seq_length,
            config.kv_heads,
            config.head_dim,
        )
        self.keys, self.values = torch.zeros(2, *shape, dtype=config.dtype, device=config.device)
        # [batch, length] of each layer, None while it is empty; no length after positions
        self._sizes: list[tuple[int, int | None] | None] = [None] * config.num_layers

    def length(self, layer_idx: int) -> int:
        """Tokens of each sequence in a layer; max_seq_length once positions were given."""
        size = self._sizes[self._layer("length", layer_idx)]
        if size is None:
            return 0
        return self.config.max_seq_length if size[1] is None else size[1]

    def update(
        self, layer_idx: int, k: Tensor, v: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Adds keys and values of a layer; nothing that was cached is copied.

        Args:
            layer_idx: which layer.
            k, v: [batch, seqlen, num_kv_heads, head_dim], dtype and device of the cache.
            positions: [seqlen], [1, seqlen] or [batch, seqlen] int64 on the device: where they go.
                They are read there, so a CUDA graph or compiled code serves any positions; one
                outside the cache is skipped. None appends, which a layer that was given positions
                refuses until clear().

        Returns:
            Views of all keys and values, [batch, length, num_kv_heads, head_dim]. With positions
            the host knows no length: all max_seq_length, of which the caller masks what it has not
            written (zeros).

        Raises:
            ValueError: for shapes, dtypes, devices and layers, by name.
            RuntimeError: for more tokens than max_seq_length, with the numbers; for no positions
                where they were given before.
        """
        batch, seqlen = self._check(layer_idx, k, v)
        limit = self.config.max_seq_length
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if positions is not None:
            device = k.device
            self._check_positions(positions, batch, seqlen)
            table = torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1)
            starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
            slots = slot_mapping(
                positions.expand(batch, -1).flatten().contiguous(), table, starts, limit
            )
            append_kv_(k.flatten(0, 1), v.flatten(0, 1), keys, values, slots)
            self._sizes[layer_idx] = (batch, None)
            return keys[:batch], values[:batch]
        if self._sizes[layer_idx] == (batch, None):
            raise RuntimeError(
                f"KVCache.update: positions must be given for layer {layer_idx}, which was given "
                "some before: they are on the device, so where the sequence ends is not known "
                "here; clear() starts anew"
            )
        begin = self.length(layer_idx)
        end = begin + seqlen
        if end > limit:
            raise RuntimeError(
                f"KVCache.update: a sequence must fit max_seq_length = {limit}, got {begin} + "
                f"{seqlen} tokens in layer {layer_idx}; clear() or a larger cache make room"
            )
        keys[:batch, begin:end].copy_(k)
        values[:batch, begin:end].copy_(v)
        self._sizes[layer_idx] = (batch, end)
        return keys[:batch, :end], values[:batch, :end]

    def get(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Views of a layer's keys and values, [batch, length, num_kv_heads, head_dim]; None while
        it is empty."""
        size = self._sizes[self._layer("get", layer_idx)]
        if size is None:
            return None
        batch, length = size[0], self.length(layer_idx)
        return self.keys[layer_idx, :batch, :length], self.values[layer_idx, :batch, :length]

    def clear(self) -> None:
        """Forgets all tokens; the tensors stay."""
        self._sizes = [None] * self.config.num_layers
        self.keys.zero_()
        self.values.zero_()

    def reorder(self, layer_idx: int, rows: Tensor) -> None:
        """Row b of a layer becomes what row rows[b] is, as beam search asks for; the layer has
        len(rows) rows then. An empty layer stays as it is.

        Args:
            layer_idx: which layer.
            rows: [batch] int32 or int64, each a row that the layer has. Those on a GPU are not
                looked at, which would wait for it: one out of range is an error of torch there.

        Raises:
            ValueError: for another layer, dtype or shape, more rows than max_batch_size, and on the
                CPU a row that the layer does not have.
        """
        size = self._sizes[self._layer("reorder", layer_idx)]
        is_known = isinstance(rows, Tensor) and rows.dtype in (torch.int32, torch.int64)
        if not is_known or rows.dim() != 1:
            raise ValueError(
                f"KVCache.reorder: rows must be an int32 or int64 tensor [batch], got {rows!r:.80}"
            )
        if size is None:
            return
        count, limit = len(rows), self.config.max_batch_size
        if count > limit:
            raise ValueError(
                f"KVCache.reorder: rows must be at most max_batch_size = {limit}, got {count}"
            )
        if rows.device.type == "cpu" and ((rows < 0) | (rows >= size[0])).any():
            raise ValueError(
                f"KVCache.reorder: rows must lie in [0, {size[0]}), got {rows.tolist()!r:.80}"
            )
        length = self.length(layer_idx)
        for x in (self.keys[layer_idx, :, :length], self.values[layer_idx, :, :length]):
            x[:count].copy_(x[: size[0]].index_select(0, rows.to(x.device)))
        self._sizes[layer_idx] = (count, size[1])

    def truncate(self, layer_idx: int, length: int) -> None:
        """Takes the last tokens of a layer away, so that length stay."""
        size, now = self._sizes[self._layer("truncate", layer_idx)], self.length(layer_idx)
        if not 0 <= integer("KVCache.truncate: length", length) <= now:
            raise ValueError(f"KVCache.truncate: length must lie in [0, {now}], got {length}")
        self._sizes[layer_idx] = (size[0], length) if size and length else None

    def for_transformers(self) -> Any:
        """A transformers Cache over this one, for ``generate(past_key_values=...)``, which is
        ``generate(cache=...)`` from transformers 5.24 on."""
        from llamatelemetry.inference.hf_cache import contiguous_cache

        return contiguous_cache(self)

    def _layer(self, method: str, layer_idx: int) -> int:
        """layer_idx, refused where there is no such layer."""
        name, count = f"KVCache.{method}: layer_idx", self.config.num_layers
        if not 0 <= integer(name, layer_idx) < count:
            raise ValueError(f"{name} must lie in [0, {count}), got {layer_idx}")
        return layer_idx

    def _check(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[int, int]:
        config, op = self.config, "KVCache.update"
        for name, x in (("k", k), ("v", v)):
            instance(f"{op}: {name}", x, Tensor, "a tensor")
        inference_only(op, k=k, v=v)
        self._layer("update", layer_idx)
        size = self._sizes[layer_idx]
        tail = (config.kv_heads, config.head_dim)
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4 or x.shape[2:] != tail or x.shape != k.shape:
                raise ValueError(
                    f"{op}: {name} must be [batch, seqlen, {tail[0]}, {tail[1]}] as k and the "
                    f"cache are, got shape {list(x.shape)}"
                )
            if (x.dtype, x.device) != (self.keys.dtype, self.keys.device):
                raise ValueError(
                    f"{op}: {name} must be {self.keys.dtype} on {self.keys.device} as the cache "
                    f"is, got {x.dtype} on {x.device}"
                )
        batch = k.shape[0]
        if batch > config.max_batch_size or (size is not None and size[0] != batch):
            wanted = f"at most {config.max_batch_size}" if size is None else str(size[0])
            raise ValueError(f"{op}: batch must be {wanted}, got {batch}; clear() starts anew")
        return batch, k.shape[1]

    def _check_positions(self, positions: Tensor, batch: int, seqlen: int) -> None:
        op = "KVCache.update"
        if not isinstance(positions, Tensor):
            raise ValueError(f"{op}: positions must be a tensor, got {type(positions).__name__}")
        if tuple(positions.shape) not in ((seqlen,), (1, seqlen), (batch, seqlen)):
            raise ValueError(
                f"{op}: positions must be [{seqlen}] or [{batch}, {seqlen}] for k of [batch, "
                f"seqlen] = [{batch}, {seqlen}], got shape {list(positions.shape)}"
            )
        if (positions.dtype, positions.device) != (torch.int64, self.keys.device):
            raise ValueError(
                f"{op}: positions must be torch.int64 on {self.keys.device}, got "
                f"{positions.dtype} on {positions.device}"
            )


def optimize_kv_cache(model: _Model) -> _Model:
    """Gives a model's generate buffers, or pages, in the place of transformers' growing tensors.

    A model that ``patch`` has prepared, before or after, keeps all keys and values in one paged
    cache: prompts run packed, without padding on their left, and each further token of a batch is
    one replay of a recording (CPU, quantised weights) or of a CUDA graph. Processors, sampling,
    streamers, criteria, beams, assistants and returned caches stay generate's own. What this does
    not serve (other masks, embeddings, gradients, hidden states, a module that was changed) goes
    the model's own way with the same result, and the log says once why. The pages stay for later
    calls and grow to what open caches need together; caches of a copied or pickled model, and
    threads, do not meet in them.

    Another model has a KVCache a layer, made once a call, as long as it may get, so that no step
    copies what was cached; sliding windows, static and offloaded caches, and caches given to
    generate stay as they are. ``restore_kv_cache`` undoes it and frees the pages.

    Args:
        model: A transformers model that can generate.

    Returns:
        The model.

    Raises:
        ValueError: For another model, or one with latent attention.

    Example:
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> optimize_kv_cache(model).generate(ids, max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """
    from llamatelemetry.inference.model_cache import optimize

    optimize(model)
    return model


def restore_kv_cache(model: _Model) -> _Model:
    """Undoes optimize_kv_cache; a model that it was not called on stays as it is.

    Example:
        >>> restore_kv_cache(optimize_kv_cache(model)) is model
        True
    """
    from llamatelemetry.inference.model_cache import restore

    instance("restore_kv_cache: model", model, torch.nn.Module, "a module")
    restore(model)
    return model
