"""Quantised weights as whole tensors: dequantise, repack for the kernels, unpack, look up rows."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from llamatelemetry.ops._contract import register_fake

TILE_ROWS = 16  # of a packed matrix, see csrc/common/quant_layout.h


class QuantFormat(IntEnum):
    """The quantised formats of GGUF that our ops read, by GGML type number."""

    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights, in GGUF and packed."""
        weights, num_bytes = GGUF_BLOCKS[self]
        return k // weights * num_bytes


# Weights and bytes of a block, as csrc/common/quant_layout.h has them.
GGUF_BLOCKS: dict[int, tuple[int, int]] = {
    QuantFormat.Q4_0: (32, 18),
    QuantFormat.Q4_1: (32, 20),
    QuantFormat.Q5_0: (32, 22),
    QuantFormat.Q5_1: (32, 24),
    QuantFormat.Q8_0: (32, 34),
    QuantFormat.Q4_K: (256, 144),
    QuantFormat.Q5_K: (256, 176),
    QuantFormat.Q6_K: (256, 210),
}


def format_number(format: int | str) -> int:
    """The GGML type number of a format given by name or number; the ops refuse a wrong number."""
    if isinstance(format, str):
        if format not in QuantFormat.__members__:
            raise ValueError(f"format must be one of {list(QuantFormat.__members__)}, got {format}")
        return QuantFormat[format].value
    return int(format)


def dequantize(data: Tensor, format: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of GGUF blocks: ``scale * code - minimum`` in float32, rounded once to dtype.

    data:    [..., row_bytes] uint8, whole blocks of the format; rows contiguous, evenly spaced
    format:  a QuantFormat, its name or its GGML type number
    dtype:   float32, float16 or bfloat16
    Returns: [..., weights in row_bytes] of dtype, contiguous; float32 equals
             gguf.quants.dequantize bit for bit
    Raises:  RuntimeError naming the argument, the rule and the value
    Source:  ggml's ggml-common.h and gguf-py's quants.py
    """
    return torch.ops.llamatelemetry.dequantize.default(data, format_number(format), dtype)


@register_fake("dequantize")
def _(data: Tensor, format: int, dtype: torch.dtype) -> Tensor:
    weights, num_bytes = GGUF_BLOCKS[format]
    shape = (*data.shape[:-1], data.shape[-1] // num_bytes * weights)
    return data.new_empty(shape, dtype=dtype)


def repack(data: Tensor, format: int | str) -> Tensor:
    """GGUF rows in the layout that quant_linear and quant_embedding read: tiles of 16 rows.

    data:    [n, row_bytes] uint8, whole blocks of the format; rows contiguous
    format:  a QuantFormat, its name or its GGML type number
    Returns: [ceil(n / 16), 16 * row_bytes] uint8; rows past n are zero
    Raises:  RuntimeError naming the argument, the rule and the value
    Source:  csrc/common/quant_layout.h
    """
    return torch.ops.llamatelemetry.repack.default(data, format_number(format))


@register_fake("repack")
def _(data: Tensor, format: int) -> Tensor:
    n, row_bytes = data.shape
    return data.new_empty(((n + TILE_ROWS - 1) // TILE_ROWS, TILE_ROWS * row_bytes))


def unpack(packed: Tensor, format: int | str, n: int, k: int) -> Tensor:
    """The exact inverse of repack, bit for bit.

    packed:  [ceil(n / 16), 16 * row_bytes] uint8, from repack
    format:  a QuantFormat, its name or its GGML type number
    n, k:    rows and weights of a row
    Returns: [n, row_bytes] uint8
    Raises:  RuntimeError naming the argument, the rule and the value
    Source:  csrc/common/quant_layout.h
    """
    return torch.ops.llamatelemetry.unpack.default(packed, format_number(format), n, k)


@register_fake("unpack")
def _(packed: Tensor, format: int, n: int, k: int) -> Tensor:
    return packed.new_empty((n, QuantFormat(format).row_bytes(k)))
