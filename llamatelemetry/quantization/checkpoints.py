"""Layouts of quantised linears in checkpoints: GPTQ, AWQ, compressed-tensors, and bytes of weights.

Each is read to codes [n, k], scales [n, groups], zero points [n, groups] and the order of columns.
Sources: AutoGPTQ's and GPTQModel's packing (bits of a code from the lowest on, zero points less one
in the first version), AutoAWQ's (columns in the order 0 2 4 6 1 3 5 7 within 32 bits),
compressed-tensors' pack_to_int32 (codes made unsigned).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llamatelemetry.quantization import bitsandbytes
from llamatelemetry.quantization.fields import MOST_INT8_COLUMNS, tensor_of, two_sizes
from llamatelemetry.quantization.groups import GroupedWeight, of_known_groups, pack_groups
from llamatelemetry.quantization.layouts import Layout
from llamatelemetry.quantization.w8a8 import W8A8Linear

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Codes:
    """A linear as read: ``weight = scale * (code - zero)`` with columns in their own order.

    Attributes:
        codes: [n, k] uint8
        scales: [n, groups]
        zeros: [n, groups] uint8
        group_of: [k], the group of each column; None where they come in their order
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor | None


def load_linear(
    layout: Layout, found: Mapping[str, Tensor]
) -> tuple[GroupedWeight, tuple[int, int], Tensor | None]:
    """A linear's tensors in our kernels' layout, its [n, k], and the order of its columns.

    Args:
        layout: from layout_of.
        found: the tensors, by their names without the module's, on the device to unpack them on.

    Raises:
        ValueError: a tensor that is missing, of another shape than the others say, or what of it
            our kernels do not read.
    """
    if layout.bytes_apart:
        weight = _bytes(layout, found)
        return weight, tuple(found["weight"].shape), None  # type: ignore[return-value]
    codes = read_linear(layout, found)
    packed, perm = pack_linear(layout, codes)
    return packed, tuple(codes.codes.shape), perm  # type: ignore[return-value]


def _bytes(layout: Layout, found: Mapping[str, Tensor]) -> GroupedWeight:
    codes = tensor_of(found, "weight")
    formats = {torch.int8: "S8", torch.float8_e4m3fn: "E4M3"}
    if codes.dtype not in formats or codes.dim() != 2:
        raise ValueError(f"weight must be two-dimensional int8 or float8_e4m3fn, got {codes.dtype}")
    n, k = codes.shape
    sign = next((name for name in layout.signs if name in found), layout.signs[0])
    scales = tensor_of(found, sign).float()
    if layout.method == "bitsandbytes":
        scales = bitsandbytes.row_scales(found, n)
    if "weight_zero_point" in found and bool(found["weight_zero_point"].float().any()):
        raise ValueError("weight_zero_point must be zero (a symmetric quantiser) beside int8 codes")
    if layout.block is not None:
        rows, columns = layout.block
        blocks = -(-n // rows), -(-k // columns)
        if scales.shape != blocks:
            raise ValueError(
                f"{sign} must be {blocks} for blocks of {layout.block}, got {tuple(scales.shape)}"
            )
        if k > columns and k % columns:
            raise ValueError(f"in_features must be a multiple of {columns}, got {k}")
        scales = scales.repeat_interleave(rows, 0)[:n]
    else:
        scales = _of_rows(sign, scales, n)
    return pack_groups(codes, formats[codes.dtype], of_known_groups(scales, k))


def load_w8a8(layout: Layout, found: Mapping[str, Tensor]) -> W8A8Linear | None:
    """A linear that multiplies bytes, without its bias, of a layout that takes rows.

    Args:
        layout, found: as of load_linear.

    Returns:
        None where its weights have other scales than W8A8Linear's.
    """
    codes, sign = tensor_of(found, "weight"), next(n for n in layout.signs if n in found)
    scales = found[sign].float()
    kinds = (torch.int8, torch.float8_e4m3fn)
    if codes.dtype not in kinds or codes.dim() != 2 or found.get("weight_zero_point") is not None:
        return None
    n, k = codes.shape
    if layout.block is not None:
        blocks = -(-n // layout.block[0]), -(-k // layout.block[1])
        if scales.shape != blocks or codes.dtype == torch.int8:
            return None
        return W8A8Linear(codes.contiguous(), scales.contiguous(), None, layout.block[1])
    if scales.numel() not in (1, n) or (codes.dtype == torch.int8 and k > MOST_INT8_COLUMNS):
        return None
    return W8A8Linear(codes.contiguous(), scales.reshape(-1, 1).expand(n, 1).contiguous())


def _of_rows(name: str, scales: Tensor, n: int) -> Tensor:
    """[n, groups] scales, where a file may have a single one."""
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(n, 1)
    if scales.dim() != 2 or len(scales) != n or scales.shape[1] == 0:
        raise ValueError(f"{name} must be [{n}, groups] or a single one, got {tuple(scales.shape)}")
    return scales


def read_linear(layout: Layout, found: Mapping[str, Tensor]) -> Codes:
    """Unpacks a linear's tensors, by their names without the module's, on the device they are on.

    Raises:
        ValueError: a tensor that is missing or of another shape than the others say.
    """
    read = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[layout.method]
    return read(layout, found)


def pack_linear(layout: Layout, found: Codes) -> tuple[GroupedWeight, Tensor | None]:
    """In our kernels' layout, and the order in which the columns were sorted, [k] int32 or None.

    Raises:
        ValueError: groups of another size than the kernels know, or zero points of 8-bit codes that
            are not in the middle.
    """
    codes, scales, zeros = found.codes, found.scales, found.zeros
    k, groups = codes.shape[1], scales.shape[1]
    size = k // max(groups, 1)
    if k % 32 or groups * size != k:
        raise ValueError(f"in_features must be a multiple of 32 and of its groups, got {k}")
    perm = None
    if found.group_of is not None:
        perm = _order(found.group_of, groups, size)
    if perm is not None:
        codes = codes[:, perm]
    scales, zeros = of_known_groups(scales, k), of_known_groups(zeros, k)
    middle = 1 << (layout.bits - 1)
    if bool((zeros == middle).all()):
        signed = (codes.to(torch.int16) - middle).to(torch.int8)
        weight = pack_groups(signed, "S4" if layout.bits == 4 else "S8", scales)
    elif layout.bits == 4:
        weight = pack_groups(codes, "U4", scales, zeros)
    else:
        raise ValueError("zero points of 8-bit weights must be 128 (a symmetric quantiser)")
    return weight, None if perm is None else perm.int()


def _gptq(layout: Layout, found: Mapping[str, Tensor]) -> Codes:
    qweight, scales = tensor_of(found, "qweight"), _matrix(found, "scales")
    codes = _unpacked(qweight, layout.bits, 0).T
    zeros = _unpacked(tensor_of(found, "qzeros"), layout.bits, 1)
    # Of four or eight bits: a zero point of 0 was stored as the largest.
    zeros = (zeros + layout.zero_added) & ((1 << layout.bits) - 1)
    return _checked(Codes(codes, scales.T, zeros.T, _groups_of(found.get("g_idx"))))


def _awq(layout: Layout, found: Mapping[str, Tensor]) -> Codes:
    place = torch.tensor(_AWQ_ORDER).argsort()

    def columns(name: str) -> Tensor:
        values = _unpacked(tensor_of(found, name), layout.bits, 1)
        return values.unflatten(1, (-1, len(_AWQ_ORDER)))[..., place].flatten(1)

    scales = _matrix(found, "scales")
    return _checked(Codes(columns("qweight").T, scales.T, columns("qzeros").T, None))


def _compressed(layout: Layout, found: Mapping[str, Tensor]) -> Codes:
    n, k = two_sizes("weight_shape", tensor_of(found, "weight_shape").tolist())
    scales = _of_rows("weight_scale", tensor_of(found, "weight_scale"), n)
    codes = _unpacked(tensor_of(found, "weight_packed"), layout.bits, 1)[:, :k]
    if (packed := found.get("weight_zero_point")) is not None:
        zeros = _unpacked(packed, layout.bits, 0)[:n]
    else:
        middle = 1 << (layout.bits - 1)
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8, device=scales.device)
    return _checked(Codes(codes, scales, zeros, _groups_of(found.get("weight_g_idx"))))


def _unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """uint8 codes of int32 words, those of a word side by side along dim, from the lowest bits."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(
            f"packed codes must be two-dimensional int32, got {words.dtype} of {tuple(words.shape)}"
        )
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    shape = [1, 1, 1]
    shape[dim + 1] = -1
    codes = (words.unsqueeze(dim + 1) >> shifts.view(shape)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(dim, dim + 1)


def _order(group_of: Tensor, groups: int, size: int) -> Tensor | None:
    """Columns sorted by group; None where they are."""
    known = len(group_of) == groups * size and bool((group_of < groups).all())
    if not known or not bool((group_of.bincount() == size).all()):
        raise ValueError(f"g_idx must name each of {groups} groups {size} times")
    if bool((group_of[1:] >= group_of[:-1]).all()):
        return None
    return group_of.argsort(stable=True)


def _groups_of(g_idx: Tensor | None) -> Tensor | None:
    if g_idx is None or g_idx.numel() == 0 or bool((g_idx < 0).any()):  # -1: not set
        return None
    if g_idx.dim() != 1:
        raise ValueError(f"g_idx must name a group for each column, got {tuple(g_idx.shape)}")
    return g_idx.long()


def _checked(found: Codes) -> Codes:
    n, k = found.codes.shape
    groups = found.scales.shape[1]
    if found.scales.shape[0] != n or found.zeros.shape != found.scales.shape or groups == 0:
        raise ValueError(
            f"scales and zero points must be of {n} rows alike, got {tuple(found.scales.shape)} "
            f"and {tuple(found.zeros.shape)}"
        )
    if found.group_of is not None and len(found.group_of) != k:
        raise ValueError(f"g_idx must name the group of {k} columns, got {len(found.group_of)}")
    return found


def _matrix(found: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = tensor_of(found, name)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be two-dimensional, got {tuple(tensor.shape)}")
    return tensor
