"""Quantised weights as whole tensors: dequantise, repack for the kernels, unpack, look up rows."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import register_fake
from llamatelemetry.ops.formats import TILE_ROWS, QuantFormat, format_facts, format_name


def dequantize(
    data: Tensor,
    format: QuantFormat | int | str,
    dtype: torch.dtype = torch.float32,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """The weights of GGUF blocks: ``scale * code - minimum`` in float32, rounded once to dtype.

    Args:
        data: [..., row_bytes] uint8, whole blocks of the format; rows contiguous, evenly spaced.
        format: A QuantFormat, its name or its GGML type number.
        dtype: float32, float16 or bfloat16.
        scales: For formats whose scales are a tensor of their own; of today's, none.
        zeros: For formats whose zero points are; of today's, none.
        perm: For formats whose columns were sorted; of today's, none.

    Returns:
        [..., weights in row_bytes] of dtype, contiguous; float32 equals gguf.quants.dequantize bit
        for bit.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        ggml's ggml-common.h and gguf-py's quants.py.
    """
    return torch.ops.llamatelemetry.dequantize.default(
        data, format_name(format), dtype, scales, zeros, perm
    )


@register_fake("dequantize")
def _(
    data: Tensor,
    format: str,
    dtype: torch.dtype,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    facts = format_facts("dequantize", format)
    shape = (*data.shape[:-1], data.shape[-1] // facts.block_bytes * facts.block_size)
    return data.new_empty(shape, dtype=dtype)


def repack(data: Tensor, format: QuantFormat | int | str, layout: str = "rows16") -> Tensor:
    """GGUF rows in the layout that quant_linear and quant_embedding read.

    Args:
        data: [n, row_bytes] uint8, whole blocks of the format; rows contiguous.
        format: A QuantFormat, its name or its GGML type number.
        layout: "rows16", tiles of 16 rows, is the only one yet.

    Returns:
        [ceil(n / 16), 16 * row_bytes] uint8; rows past n are zero.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        csrc/format/layout.h.
    """
    return torch.ops.llamatelemetry.repack.default(data, format_name(format), layout)


@register_fake("repack")
def _(data: Tensor, format: str, layout: str = "rows16") -> Tensor:
    n, row_bytes = data.shape
    return data.new_empty(((n + TILE_ROWS - 1) // TILE_ROWS, TILE_ROWS * row_bytes))


def unpack(
    packed: Tensor, format: QuantFormat | int | str, n: int, k: int, layout: str = "rows16"
) -> Tensor:
    """The exact inverse of repack, bit for bit.

    Args:
        packed: [ceil(n / 16), 16 * row_bytes] uint8, from repack.
        format: A QuantFormat, its name or its GGML type number.
        n: Rows.
        k: Weights of a row.
        layout: The one that repack was given.

    Returns:
        [n, row_bytes] uint8.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        csrc/format/layout.h.
    """
    return torch.ops.llamatelemetry.unpack.default(packed, format_name(format), n, k, layout)


@register_fake("unpack")
def _(packed: Tensor, format: str, n: int, k: int, layout: str = "rows16") -> Tensor:
    facts = format_facts("unpack", format)
    return packed.new_empty((n, k // facts.block_size * facts.block_bytes))


def quant_embedding(
    ids: Tensor,
    packed: Tensor,
    format: QuantFormat | int | str,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """Rows of a packed matrix: ``weight[ids]``, decoded in float32, rounded once to dtype.

    Args:
        ids: Any shape, int64 or int32, contiguous; an id outside [0, n) gives a row of zeros.
        packed: What repack returns for [n, k].
        format: A QuantFormat, its name or its GGML type number.
        n: Rows of the matrix.
        k: Weights of a row.
        dtype: float32, float16 or bfloat16.
        scales: For formats whose scales are a tensor of their own; of today's, none.
        zeros: For formats whose zero points are; of today's, none.
        perm: For formats whose columns were sorted; of today's, none.

    Returns:
        [*ids.shape, k] of dtype; float32 equals dequantize bit for bit.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.

    Source:
        csrc/format/layout.h.
    """
    return torch.ops.llamatelemetry.quant_embedding.default(
        ids, packed, format_name(format), n, k, dtype, scales, zeros, perm
    )


@register_fake("quant_embedding")
def _(
    ids: Tensor,
    packed: Tensor,
    format: str,
    n: int,
    k: int,
    dtype: torch.dtype,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    return packed.new_empty((*ids.shape, k), dtype=dtype)
