"""Linears as bitsandbytes keeps them in safetensors: 4-bit codes of a table, or int8 rows.

Of 4 bits, each block of weights (64 by default) has a largest size, absmax, which may itself be
kept as a byte for each, of a table, with a size for each block of those and one offset. Source: the
tensors and the quant_state that bitsandbytes' functional.QuantState writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry._native.facts import FORMATS
from llamatelemetry.quantization.fields import tensor_of, two_sizes
from llamatelemetry.quantization.groups import (
    GROUPS,
    LARGEST_GROUP,
    GroupedWeight,
    of_known_groups,
    pack_groups,
)

_STATES = ("nf4", "fp4")
# A linear's tensors besides its bias, of 4 bits and of 8.
TENSORS = {
    4: (
        "weight",
        *(f"weight.{name}" for name in ("absmax", "quant_map", "nested_absmax")),
        "weight.nested_quant_map",
        *(f"weight.quant_state.bitsandbytes__{kind}" for kind in _STATES),
    ),
    8: ("weight", "SCB", "weight_format"),
}
SIGNS = {4: ("weight.absmax",), 8: ("SCB",)}


@dataclass(frozen=True)
class FourBits:
    """A linear as read: ``weight = table[code] * absmax`` in float32.

    Attributes:
        codes: [n, k] uint8
        table: [16] float32
        absmax: [ceil(n * k / block)] float32
        block: weights that share an absmax, counted through all rows
    """

    codes: Tensor
    table: Tensor
    absmax: Tensor
    block: int

    def packed(self) -> GroupedWeight | None:
        """In the kernels' layout; None of a table or of blocks that they do not know."""
        k = self.codes.shape[1]
        known = self.block in GROUPS or self.block == k or self.block % LARGEST_GROUP == 0
        format = next(filter(self._is_of, ("NF4", "FP4")), None)
        if format is None or not known or k % self.block or k % 32:
            return None
        scales = self.absmax.view(-1, k // self.block)
        return pack_groups(self.codes, format, of_known_groups(scales, k))

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """A linear without its bias, its weights rounded once to dtype."""
        n, k = self.codes.shape
        each = self.absmax.repeat_interleave(self.block)[: n * k].view(n, k)
        linear = nn.Linear(k, n, bias=False, device="meta")
        weight = (self.table[self.codes.int()] * each).to(dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    def _is_of(self, format: str) -> bool:
        """Whether the table is that format's, of which bitsandbytes itself reads no other."""
        values = torch.tensor(FORMATS[format].values, device=self.table.device)
        return torch.allclose(self.table, values, rtol=1e-6, atol=0)


def read_four_bits(found: Mapping[str, Tensor]) -> FourBits:
    """A linear of 4-bit codes; a nested absmax is resolved.

    Args:
        found: TENSORS[4] by name.

    Raises:
        ValueError: a tensor that is missing or not of its shape.
    """
    state = _state(found)
    codes = tensor_of(found, "weight")
    table = tensor_of(found, "weight.quant_map").float().flatten()
    n, k = two_sizes("quant_state's shape", state.get("shape"))
    block = min(_size(state, "blocksize"), n * k)
    if codes.dtype != torch.uint8 or codes.numel() != (n * k + 1) // 2 or table.numel() != 16:
        raise ValueError(
            f"weight must be {(n * k + 1) // 2} bytes of codes of a table of 16, got "
            f"{codes.numel()} of {codes.dtype} and a table of {table.numel()}"
        )
    flat = codes.flatten()
    each = torch.stack((flat >> 4, flat & 15), -1).flatten()[: n * k]  # the first in the high bits
    absmax = _absmax(found, state)
    if absmax.numel() != -(-n * k // block):
        raise ValueError(
            f"weight.absmax must have {-(-n * k // block)} values, got {absmax.numel()}"
        )
    return FourBits(each.view(n, k), table, absmax, block)


def row_scales(found: Mapping[str, Tensor], n: int) -> Tensor:
    """What n rows of int8 codes are multiplied by, [n, 1]: SCB is a row's largest size.

    Raises:
        ValueError: codes that do not lie row by row, as old versions have them; another number of
            sizes.
    """
    if (order := found.get("weight_format")) is not None and bool(order.any()):
        raise ValueError(f"weight_format must be 0 (row by row), got {order.tolist()}")
    largest = tensor_of(found, "SCB").float().reshape(-1, 1)
    if len(largest) != n:
        raise ValueError(f"SCB must have {n} values, one for each row, got {len(largest)}")
    return largest / torch.full_like(largest, 127)  # by a number CUDA multiplies by 1 / 127


def _absmax(found: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    absmax = tensor_of(found, "weight.absmax").flatten()
    if absmax.is_floating_point():
        return absmax.float()
    if absmax.dtype != torch.uint8:
        raise ValueError(f"weight.absmax must be uint8 or floating, got {absmax.dtype}")
    table = tensor_of(found, "weight.nested_quant_map").float()
    block = min(_size(state, "nested_blocksize"), max(absmax.numel(), 1))
    sizes = tensor_of(found, "weight.nested_absmax").float()
    if table.numel() != 256 or sizes.numel() != -(-absmax.numel() // block):
        raise ValueError(
            f"weight.nested_absmax must have {-(-absmax.numel() // block)} values and its table "
            f"256, got {sizes.numel()} and {table.numel()}"
        )
    offset: Any = state.get("nested_offset")
    is_number = isinstance(offset, (int, float)) and not isinstance(offset, bool)
    if not is_number or not abs(offset) < torch.finfo(torch.float32).max:  # nor is NaN
        raise ValueError(f"quant_state's nested_offset must be a finite number, got {offset!r}")
    each = sizes.flatten().repeat_interleave(block)[: absmax.numel()]
    return table.flatten()[absmax.int()] * each + offset


def _state(found: Mapping[str, Tensor]) -> Mapping[str, Any]:
    names = [name for name in found if ".quant_state." in name]
    if len(names) != 1:
        raise ValueError(f"weight must have one quant_state of {' or '.join(_STATES)}, got {names}")
    try:
        state = json.loads(bytes(found[names[0]].flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"weight's quant_state must be JSON in bytes, got {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"weight's quant_state must be an object, got {state}")
    return state


def _size(state: Mapping[str, Any], name: str) -> int:
    size = state.get(name)
    if type(size) is not int or size < 1:  # true is an int too
        raise ValueError(f"quant_state's {name} must be a size from 1, got {size!r}")
    return size
