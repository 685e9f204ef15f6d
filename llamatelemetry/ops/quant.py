"""Quantised weights as whole tensors: dequantise, repack for the kernels, unpack, look up rows."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import register_fake
from llamatelemetry.ops.formats import GGUF_BLOCKS, TILE_ROWS, QuantFormat, format_number


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
    Source:  csrc/format/layout.h
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
    Source:  csrc/format/layout.h
    """
    return torch.ops.llamatelemetry.unpack.default(packed, format_number(format), n, k)


@register_fake("unpack")
def _(packed: Tensor, format: int, n: int, k: int) -> Tensor:
    return packed.new_empty((n, QuantFormat(format).row_bytes(k)))


def quant_embedding(
    ids: Tensor,
    packed: Tensor,
    format: int | str,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a packed matrix: ``weight[ids]``, decoded in float32, rounded once to dtype.

    ids:     any shape, int64 or int32, contiguous; an id outside [0, n) gives a row of zeros
    packed:  what repack returns for [n, k]
    format:  a QuantFormat, its name or its GGML type number
    n, k:    rows of the matrix and weights of a row
    dtype:   float32, float16 or bfloat16
    Returns: [*ids.shape, k] of dtype; float32 equals dequantize bit for bit
    Raises:  RuntimeError naming the argument, the rule and the value
    Source:  csrc/format/layout.h
    """
    return torch.ops.llamatelemetry.quant_embedding.default(
        ids, packed, format_number(format), n, k, dtype
    )


@register_fake("quant_embedding")
def _(ids: Tensor, packed: Tensor, format: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*ids.shape, k), dtype=dtype)
