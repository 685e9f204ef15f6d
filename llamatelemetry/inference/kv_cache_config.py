"""Sizes of a key-value cache, and the memory that they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llamatelemetry.inference.arguments import instance, integer

# What caches of 8 bits hold, with scales.
EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)
# What caches beside float32 hold on the CPU.
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class ServesTransformers:
    """A cache that transformers takes only through its for_transformers()."""

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        raise AttributeError(
            f"{kind!r} object has no attribute {name!r}; transformers takes "
            f"{kind}.for_transformers(), not the {kind}"
        )


@dataclass(frozen=True)
class KVCacheConfig:
    """Sizes of a cache.

    Attributes:
        num_heads: query heads; keys and values have num_kv_heads, None for as many.
        dtype: of keys and values; PagedKVCache keeps those of 8 bits with a float32 scale for each
            token and head, and on the CPU rounds float32 to 16 bits.
        device: None is torch's default device.

    Raises:
        ValueError: for a size below 1 and for another dtype, by name.

    Example:
        >>> KVCacheConfig(max_batch_size=1, num_layers=32, num_heads=32, num_kv_heads=8).num_bytes
        536870912
    """

    max_batch_size: int = 8
    max_seq_length: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    head_dim: int = 128
    dtype: torch.dtype = torch.float16
    num_kv_heads: int | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_length", "num_layers", "num_heads", "head_dim"):
            self._check(name)
        if self.num_kv_heads is not None:
            self._check("num_kv_heads")
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError):
                raise ValueError(
                    f"KVCacheConfig: device must be one of torch's, got {self.device!r:.80}"
                ) from None
        is_dtype = isinstance(self.dtype, torch.dtype)
        if not is_dtype or not (self.dtype.is_floating_point or self.dtype == torch.int8):
            raise ValueError(
                "KVCacheConfig: dtype must be a floating-point torch.dtype or int8, got "
                f"{self.dtype!r}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"KVCacheConfig: num_kv_heads must divide num_heads = {self.num_heads}, got "
                f"{self.num_kv_heads}"
            )

    def _check(self, name: str) -> None:
        if integer(f"KVCacheConfig: {name}", getattr(self, name)) < 1:
            raise ValueError(f"KVCacheConfig: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_bytes(self) -> int:
        """Of a cache with room for max_batch_size sequences of max_seq_length."""
        tokens = self.max_batch_size * self.max_seq_length
        return kv_cache_bytes(self.num_layers, self.kv_heads, self.head_dim, tokens, self.dtype)


def kv_cache_bytes(
    num_layers: int, num_kv_heads: int, head_dim: int, num_tokens: int, dtype: torch.dtype
) -> int:
    """``2 * num_layers * num_kv_heads * head_dim * num_tokens * bytes of dtype``: keys and values.

    Those of 8 bits have 4 bytes more for each token and head, its scale.

    Raises:
        ValueError: for a count that is no whole number of at least 0, by name.

    Returns:
        Bytes; Llama-2-70B at 8192 tokens in float16 takes 2.7 GB, and 21.5 GB had it as many key
        heads as query heads.

    Example:
        >>> kv_cache_bytes(80, 8, 128, 8192, torch.float16)
        2684354560
    """
    counts = {
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "num_tokens": num_tokens,
    }
    for name, count in counts.items():
        if integer(f"kv_cache_bytes: {name}", count) < 0:
            raise ValueError(f"kv_cache_bytes: {name} must be at least 0, got {count}")
    instance("kv_cache_bytes: dtype", dtype, torch.dtype, "a torch.dtype")
    head_bytes = head_dim * dtype.itemsize + (4 if dtype in EIGHT_BIT else 0)
    return 2 * num_layers * num_kv_heads * num_tokens * head_bytes
