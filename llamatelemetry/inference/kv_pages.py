"""The tensors of the paged KV cache: what block tables and slots index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamatelemetry.inference.kv_cache_config import EIGHT_BIT, SIXTEEN_BIT
from llamatelemetry.inference.step import keep_until_read, put
from llamatelemetry.ops import copy_blocks_

_CACHED = (*EIGHT_BIT, *SIXTEEN_BIT, torch.float32)  # the last of float32 models alone


class CacheDtypeError(ValueError):
    """A cache_dtype that does not serve.

    Attributes:
        what: the sentence behind the argument's name, for who has another name for it.
    """

    def __init__(self, what: str, who: str = "") -> None:
        super().__init__(f"{who}cache_dtype {what}")
        self.what = what


class KvPages:
    """Keys and values of every layer in pages.

    Attributes:
        layers: (k, v) of each layer, [num_blocks, page_size, num_heads_kv, head_dim]; of 8 bits
            (k, v, k_scales, v_scales), the scales float32 [num_blocks, page_size, num_heads_kv].
            grow puts other tensors in the same list.
        page_size: tokens in a block.
        model_dtype: of what for_model made them for; else dtype.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        page_size: int,
        num_heads_kv: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.page_size, self.model_dtype = page_size, dtype
        self._page = (page_size, num_heads_kv, head_dim)
        self._like = torch.empty(0, dtype=dtype, device=device)
        self.layers = [self._new(num_blocks) for _ in range(num_layers)]

    @classmethod
    def for_model(
        cls, model: Any, num_blocks: int, page_size: int, dtype: torch.dtype | None = None
    ) -> KvPages:
        """Pages that fit a transformers model's layers, on its device, in its dtype or another.

        Raises:
            CacheDtypeError: for a dtype that steps of the model do not take: check_cache_of.
        """
        check_cache_of(model, dtype)
        like, (layers, heads, head_dim) = floating_parameter(model), _sizes(model)
        stored = like.dtype if dtype is None else dtype
        pages = cls(layers, num_blocks, page_size, heads, head_dim, stored, like.device)
        pages.model_dtype = like.dtype
        return pages

    def fits(self, model: Any) -> bool:
        """Whether for_model would give such pages for the model as it is now."""
        like, (layers, *head) = floating_parameter(model), _sizes(model)
        is_alike = (like.dtype, like.device) == (self.model_dtype, self.device)
        return is_alike and layers == len(self.layers) and tuple(head) == self._page[1:]

    @property
    def num_blocks(self) -> int:
        return self.layers[0][0].shape[0] if self.layers else 0

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for x in layer)

    @property
    def block_bytes(self) -> int:
        """Of one block, in all layers."""
        return sum(x.shape[1:].numel() * x.itemsize for layer in self.layers for x in layer)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    def grow(self, num_blocks: int, *, keep: bool) -> None:
        """Makes room for num_blocks, layer by layer; with keep, what the blocks hold stays."""
        count = self.num_blocks if keep else 0
        keep_until_read(one for layer in self.layers for one in layer)
        if not keep:
            self.layers[:] = [self._new(0) for _ in self.layers]  # frees the old ones first
        try:
            for i, old in enumerate(self.layers):
                self.layers[i] = self._new(num_blocks)
                for before, larger in zip(old, self.layers[i], strict=True):
                    larger[:count].copy_(before)
        except BaseException:  # out of memory: as it was, in part in larger tensors
            self.layers[:] = [tuple(x[:count] for x in layer) for layer in self.layers]
            raise

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks (source, destination) of every layer, as BlockManager asks for."""
        if pairs:
            on_device = put(pairs, torch.int64, self.device)
            for k, v, *scales in self.layers:
                copy_blocks_(k, v, on_device)
                if scales:
                    copy_blocks_(scales[0].unsqueeze(-1), scales[1].unsqueeze(-1), on_device)

    def _new(self, num_blocks: int) -> tuple[Tensor, ...]:
        shape = (num_blocks, *self._page)
        kept = [self._like.new_empty(shape) for _ in range(2)]
        if self.dtype in EIGHT_BIT:
            kept += [self._like.new_empty(shape[:-1], dtype=torch.float32) for _ in range(2)]
        return tuple(kept)


def check_cache_dtype(dtype: Any, who: str = "") -> None:
    """
    Raises:
        CacheDtypeError: for what is neither None nor a dtype that caches of some model hold.
    """
    if dtype is not None and dtype not in _CACHED:
        *names, last = map(str, _CACHED)
        raise CacheDtypeError(f"must be None, {', '.join(names)} or {last}, got {dtype!r:.80}", who)


def check_cache_of(model: Any, dtype: torch.dtype | None, not_packed: str | None = None) -> None:
    """
    Args:
        not_packed: why packed steps, whose cache it is, do not serve the model; None where they do.

    Raises:
        CacheDtypeError: for a dtype other than the model's where no packed steps serve it or its
            ops do not convert, and for one above 8 bits but 16 where the model is float32 on the
            CPU.
    """
    if dtype is None or dtype == (like := floating_parameter(model)).dtype:
        return
    if not_packed is not None:
        raise CacheDtypeError(
            "must be the model's own where transformers' own forward generates, got "
            f"{dtype}: {not_packed}"
        )
    patched = model.__dict__.get("_llamatelemetry")
    decoder = None if patched is None else patched.decoder
    if decoder is not None and not decoder.ops.converts_caches:
        raise CacheDtypeError(
            f"must be the model's own for one patched with {decoder.ops.name} ops, got {dtype}"
        )
    is_wide = (like.dtype, like.device.type) == (torch.float32, "cpu")
    if dtype not in EIGHT_BIT and not (is_wide and dtype in SIXTEEN_BIT):
        raise CacheDtypeError(
            "must be of 8 bits or the model's own, or of 16 bits and the model float32 on the "
            f"CPU, got {dtype} and a model of {like.dtype} on {like.device}"
        )


def _sizes(model: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and head_dim of a transformers model."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim


def floating_parameter(model: Any) -> Tensor:
    """A parameter whose dtype and device are those of the model's activations."""
    return next(p for p in model.parameters() if p.is_floating_point())
