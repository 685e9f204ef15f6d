"""Weights with scales and zero points in tensors of their own, as GPTQ and AWQ keep them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llamatelemetry import ops
from llamatelemetry._native.facts import FORMATS
from llamatelemetry.ops.formats import TILE_ROWS

# Name of a format -> dtype of its codes, the least and the largest.
_CODES = {
    "U4": (torch.uint8, 0, 15),
    "S4": (torch.int8, -8, 7),
    "S8": (torch.int8, -128, 127),
    "E4M3": (torch.float8_e4m3fn, -448, 448),
    "NF4": (torch.uint8, 0, 15),
    "FP4": (torch.uint8, 0, 15),
}

GROUPS = (32, 64, 128)  # weights that share a scale, or all of a row; larger groups are repeated
LARGEST_GROUP = 128


class GroupedWeight(NamedTuple):
    """What ops.quant_linear takes of a grouped weight.

    Attributes:
        packed: [ceil(n / 16), 16 * row_bytes] uint8.
        format: "U4", "S4", "S8", "E4M3", "NF4" or "FP4".
        scales: [ceil(n / 16), groups, 16] float32.
        zeros: Likewise uint8, or None.
    """

    packed: Tensor
    format: str
    scales: Tensor
    zeros: Tensor | None


def pack_groups(
    codes: Tensor, format: str, scales: Tensor, zeros: Tensor | None = None
) -> GroupedWeight:
    """``weight = scale * (code - zero)``, a scale and a zero point for each group of a row.

    Of "NF4" and "FP4" a code is the index of one of 16 values, which the scale multiplies.

    Args:
        codes: [n, k]: for "U4", "NF4" and "FP4" uint8 up to 15, for "S4" int8 from -8 to 7, for
            "S8" int8, for "E4M3" float8_e4m3fn. k is a multiple of 32.
        format: "U4", "S4", "S8", "E4M3", "NF4" or "FP4".
        scales: [n, groups], floating. A group is 32, 64, 128 or all weights of a row.
        zeros: uint8 up to 15 of the shape of scales, for "U4" alone.

    Returns:
        Tensors in the layout that the kernels read.

    Raises:
        ValueError: format, codes or shapes are not as above.
    """
    if format not in _CODES:
        raise ValueError(f"format must be one of {sorted(_CODES)}, got {format!r}")
    dtype, least, largest = _CODES[format]
    if codes.dtype != dtype or codes.dim() != 2 or codes.shape[1] % 32:
        raise ValueError(
            f"codes must be [n, k] of {dtype} with k a multiple of 32, got {tuple(codes.shape)} of "
            f"{codes.dtype}"
        )
    values = codes.float() if format == "E4M3" else codes
    if codes.numel() and not bool(((values >= least) & (values <= largest)).all()):
        raise ValueError(
            f"codes must be {least} to {largest}, got {values.min().item()} to "
            f"{values.max().item()}"
        )
    n = len(codes)
    if scales.dim() != 2 or len(scales) != n:
        raise ValueError(f"scales must be [{n}, groups], got {tuple(scales.shape)}")
    if (zeros is None) != (format != "U4"):
        raise ValueError(
            f"zeros must be {'given' if zeros is None else 'None'} for {format}, got "
            f"{'None' if zeros is None else 'a tensor'}"
        )
    if zeros is not None:
        _check_zeros(zeros, scales)
    return GroupedWeight(
        ops.repack(rows_of_codes(codes, format), format),
        format,
        _in_tiles(scales.float()),
        None if zeros is None else _in_tiles(zeros),
    )


def of_known_groups(values: Tensor, k: int) -> Tensor:
    """[n, groups] values, those of large groups repeated for groups that the kernels know.

    Raises:
        ValueError: k is no multiple of the groups, or they are of another size.
    """
    groups = values.shape[1]
    size = k // groups
    if size * groups != k:
        raise ValueError(f"in_features must be a multiple of its {groups} groups, got {k}")
    if groups == 1 or size in GROUPS:
        return values
    if size % LARGEST_GROUP:
        raise ValueError(f"groups must be of 32, 64 or a multiple of 128 weights, got {size}")
    return values.repeat_interleave(size // LARGEST_GROUP, 1)


def _check_zeros(zeros: Tensor, scales: Tensor) -> None:
    """Kernels put a zero point in a mantissa unchecked: a large one spills into the exponent."""
    if zeros.dtype != torch.uint8 or zeros.shape != scales.shape:
        raise ValueError(
            f"zeros must be uint8 {tuple(scales.shape)} as the scales, got {zeros.dtype} of "
            f"{tuple(zeros.shape)}"
        )
    if zeros.numel() and int(zeros.max()) > 15:
        raise ValueError(f"zeros must be 0 to 15, got {int(zeros.max())}")


def unpack_groups(weight: GroupedWeight, n: int, k: int) -> Tensor:
    """The weights [n, k] that a GroupedWeight stands for, in float32."""
    codes = codes_of(weight, n, k)
    if values := FORMATS[weight.format].values:
        codes = torch.tensor(values, device=codes.device)[codes.int()]
    else:
        codes = codes.float() - (8.0 if weight.format == "S4" else 0.0)
    scales = rows_of_tiles(weight.scales, n)
    grouped = codes.view(n, scales.shape[1], -1)
    if weight.zeros is not None:
        grouped = grouped - rows_of_tiles(weight.zeros, n).float().unsqueeze(-1)
    return (grouped * scales.unsqueeze(-1)).flatten(1)


def codes_of(weight: GroupedWeight, n: int, k: int) -> Tensor:
    """The codes [n, k] as pack_groups took them, but those of "S4" as uint8, 8 more."""
    rows = ops.unpack(weight.packed, weight.format, n, k)
    if weight.format in ("S8", "E4M3"):
        return rows.view(_CODES[weight.format][0])
    halves = torch.stack([rows & 15, rows >> 4]).unflatten(2, (-1, 16))
    return halves.permute(1, 2, 0, 3).reshape(n, k)


def rows_of_codes(codes: Tensor, format: str) -> Tensor:
    """[n, row_bytes] uint8: of 32 weights in 4 bits the first half in the low nibbles."""
    if format in ("S8", "E4M3"):
        return codes.contiguous().view(torch.uint8)
    if format == "S4":
        codes = (codes + 8).view(torch.uint8)
    low, high = codes.unflatten(1, (-1, 2, 16)).unbind(2)
    return (low | high << 4).flatten(1).contiguous()


def _in_tiles(values: Tensor) -> Tensor:
    """[n, groups] to [ceil(n / 16), groups, 16]; rows past n are zero."""
    padded = pad(values, (0, 0, 0, -values.shape[0] % TILE_ROWS))
    return padded.unflatten(0, (-1, TILE_ROWS)).transpose(1, 2).contiguous()


def rows_of_tiles(tiles: Tensor, n: int) -> Tensor:
    """The first n rows of what _in_tiles made."""
    return tiles.transpose(1, 2).flatten(0, 1)[:n]
