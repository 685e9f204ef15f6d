"""What readers of checkpoints ask of a file's fields and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

MOST_INT8_COLUMNS = 131071  # of a product, whose sums then fit int32


def tensor_of(found: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name.

    Raises:
        ValueError: it is missing.
    """
    if name not in found:
        raise ValueError(f"{name} is missing")
    return found[name]


def two_sizes(name: str, sizes: Any) -> tuple[int, int]:
    """Two sizes from 1; name is the field's, for the sentence.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(sizes, (list, tuple)) or [type(size) for size in sizes] != [int, int]:
        raise ValueError(f"{name} must be two sizes, got {sizes}")
    if min(sizes) < 1:
        raise ValueError(f"{name} must be of sizes from 1, got {sizes}")
    return sizes[0], sizes[1]
