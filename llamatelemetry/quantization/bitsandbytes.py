"""Linears as bitsandbytes keeps them in safetensors: 4-bit codes of a table, or int8 rows.

Of 4 bits, each block of weights (64 by default) has a largest size, absmax, which may itself be
kept as a byte for each, of a table, with a size for each block of those and one offset. Source: the
tensors and the quant_state that bitsandbytes' functional.QuantState writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.quantization.fields import tensor_of, two_sizes

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


def dense_linear(found: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Linear:
    """A linear of 4-bit codes with the weights that these stand for, and without its bias.

    Args:
        found: TENSORS[4] by name.
        dtype: of the weights, rounded once from float32.

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
    scales = _absmax(found, state)
    if scales.numel() != -(-n * k // block):
        raise ValueError(
            f"weight.absmax must have {-(-n * k // block)} values, got {scales.numel()}"
        )
    values = table[each.int()] * scales.repeat_interleave(block)[: n * k]
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(values.view(n, k).to(dtype), requires_grad=False)
    return linear


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
