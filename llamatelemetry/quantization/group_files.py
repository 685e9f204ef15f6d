"""GroupLinears as files keep them: the tensors of each, and what config.json says of all.

Integers are compressed-tensors' pack-quantized; bytes with a scale a row whose inputs are quantised
too are its int-quantized, and e4m3 is its float-quantized, or in blocks DeepSeek's fp8 where inputs
are quantised too; NF4 and FP4 are bitsandbytes'. load_model reads all of them bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llamatelemetry._native.facts import FORMATS
from llamatelemetry.quantization.group_linear import GroupLinear
from llamatelemetry.quantization.groups import codes_of, rows_of_tiles
from llamatelemetry.quantization.rows import RowFormat
from llamatelemetry.quantization.w8a8_config import quantization_config

_BITS = {"U4": 4, "S4": 4, "S8": 8}  # of those that are packed in words
_TABLES = ("NF4", "FP4")
_BLOCK = 128  # in which inputs are quantised too
_Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Files:
    """How GroupLinears are kept.

    Attributes:
        config: quantization_config of config.json.
        tensors_of: a linear's tensors but its bias, by their names without the module's.
    """

    config: dict[str, Any]
    tensors_of: Callable[[GroupLinear], _Tensors]


def files_of(model: nn.Module, takes_rows: bool) -> Files:
    """How the GroupLinears of a model are kept.

    Args:
        model: whose other linears are dense, or W8A8Linears that need no other files.
        takes_rows: whether the inputs of linears of a byte a weight are quantised where that is
            fast, as the files said that they were loaded from.

    Raises:
        ValueError: no one config names them all.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, GroupLinear)}
    dense = dense_names(model)
    formats = {linear.format for linear in linears.values()}
    has_columns = all(linear.scales.shape[1] == 1 for linear in linears.values())
    has_order = any(linear.perm is not None for linear in linears.values())
    if formats == {"E4M3"} and not has_order:
        if has_columns:
            return _bytes(torch.float8_e4m3fn, dense, takes_rows)
        return _blocks(linears, dense, takes_rows)
    if formats == {"S8"} and takes_rows and has_columns and not has_order:
        return _bytes(torch.int8, dense, takes_rows)
    if formats <= {"U4", "S4"} or formats == {"S8"}:
        return _words(linears, dense)
    if len(formats) == 1 and formats <= {*_TABLES} and not has_order:
        return _table(linears, next(iter(formats)), dense, model)
    said = " and ".join(sorted(formats)) + (" with sorted columns" if has_order else "")
    raise ValueError(f"GroupLinears must all be of one format, or of U4 and S4, got {said}")


def dense_names(model: nn.Module) -> list[str]:
    """Names of the linears that are not quantised."""
    return [name for name, part in model.named_modules() if type(part) is nn.Linear]


def _bytes(dtype: torch.dtype, dense: list[str], takes_rows: bool) -> Files:
    config = quantization_config(RowFormat(dtype, None), dense)
    if not takes_rows:
        config["config_groups"]["group_0"]["input_activations"] = None

    def tensors_of(linear: GroupLinear) -> _Tensors:
        return {"weight": _codes(linear), "weight_scale": _scales(linear)}

    return Files(config, tensors_of)


def _blocks(linears: Mapping[str, GroupLinear], dense: list[str], takes_rows: bool) -> Files:
    columns = max(_group(one) for one in linears.values() if one.scales.shape[1] > 1)
    for name, one in linears.items():
        size = _group(one)
        if size != columns and (one.scales.shape[1] > 1 or size > columns):
            raise ValueError(f"e4m3 must be in blocks of {columns} columns, got {size} of {name}")
    is_square = all(_repeats(_scales(one), columns) for one in linears.values())
    rows = columns if is_square else 1
    if takes_rows and rows == columns == _BLOCK:
        config = quantization_config(RowFormat(torch.float8_e4m3fn, _BLOCK), dense)
        sign = "weight_scale_inv"
    else:
        config = quantization_config(RowFormat(torch.float8_e4m3fn, None), dense)
        sign = "weight_scale"
        group = config["config_groups"]["group_0"]
        group["input_activations"] = None
        group["weights"] |= {"strategy": "block", "block_structure": [rows, columns]}

    def tensors_of(linear: GroupLinear) -> _Tensors:
        return {"weight": _codes(linear), sign: _scales(linear)[::rows].contiguous()}

    return Files(config, tensors_of)


def _words(linears: Mapping[str, GroupLinear], dense: list[str]) -> Files:
    bits = {_BITS[one.format] for one in linears.values()}.pop()
    is_symmetric = all(one.zeros is None for one in linears.values())
    names: dict[int | None, list[str]] = {}
    for name, one in linears.items():
        names.setdefault(None if one.scales.shape[1] == 1 else _group(one), []).append(name)
    has_order = any(one.perm is not None for one in linears.values())
    groups = {}
    for i, (size, targets) in enumerate(names.items()):
        weights = {"num_bits": bits, "type": "int", "symmetric": is_symmetric, "dynamic": False}
        weights |= {"strategy": "channel" if size is None else "group", "group_size": size}
        weights |= {"actorder": "group"} if has_order and size is not None else {}
        groups[f"group_{i}"] = {
            "targets": targets if len(names) > 1 else ["Linear"],
            "weights": weights,
            "input_activations": None,
        }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
    }
    return Files(config, partial(_in_words, bits, is_symmetric))


def _in_words(bits: int, is_symmetric: bool, linear: GroupLinear) -> _Tensors:
    codes, scales = _codes(linear), _scales(linear)
    if bits == 8:
        codes = codes.view(torch.uint8) ^ 128
    found = {
        "weight_packed": _packed(codes, bits, 1),
        "weight_scale": _narrowest(scales),
        "weight_shape": torch.tensor(codes.shape),
    }
    if not is_symmetric:
        zeros = torch.full_like(scales, 1 << bits - 1, dtype=torch.uint8)
        if linear.zeros is not None:
            zeros = rows_of_tiles(linear.zeros, linear.out_features)
        found["weight_zero_point"] = _packed(zeros, bits, 0)
    if (perm := linear.perm) is not None:
        sorted_groups = torch.arange(len(perm), device=perm.device) // _group(linear)
        found["weight_g_idx"] = torch.empty_like(perm).index_copy_(
            0, perm.long(), sorted_groups.to(perm.dtype)
        )
    return found


def _table(
    linears: Mapping[str, GroupLinear], format: str, dense: list[str], model: nn.Module
) -> Files:
    kind, dtype = format.lower(), str(getattr(model, "dtype", torch.float32))[6:]
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }
    return Files(config, partial(_of_table, kind, dtype))


def _of_table(kind: str, dtype: str, linear: GroupLinear) -> _Tensors:
    codes, scales = _codes(linear).flatten(), _scales(linear)
    state = {
        "quant_type": kind,
        "blocksize": _group(linear),
        "dtype": dtype,
        "shape": [linear.out_features, linear.in_features],
    }
    values = torch.tensor(FORMATS[linear.format].values, device=codes.device)
    words = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": (codes[::2] << 4 | codes[1::2]).view(-1, 1),
        "weight.absmax": scales.flatten(),
        "weight.quant_map": values,
        f"weight.quant_state.bitsandbytes__{kind}": words,
    }


def _codes(linear: GroupLinear) -> Tensor:
    """[n, k] with columns in their own order."""
    codes = codes_of(linear.grouped(), linear.out_features, linear.in_features)
    if linear.perm is None:
        return codes
    return torch.empty_like(codes).index_copy_(1, linear.perm.long(), codes)


def _scales(linear: GroupLinear) -> Tensor:
    """[n, groups] float32."""
    return rows_of_tiles(linear.scales, linear.out_features).contiguous()


def _group(linear: GroupLinear) -> int:
    return linear.in_features // linear.scales.shape[1]


def _repeats(scales: Tensor, count: int) -> bool:
    """Whether each count rows are alike."""
    return torch.equal(scales[::count].repeat_interleave(count, 0)[: len(scales)], scales)


def _narrowest(scales: Tensor) -> Tensor:
    """In 16 bits where that loses nothing."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal((narrow := scales.to(dtype)).float(), scales):
            return narrow
    return scales


def _packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words of neighbours along dim, the first in the lowest bits; past the end are zeros."""
    count = 32 // bits
    rows = codes.transpose(0, dim).int()
    rows = pad(rows, (0, 0, 0, -len(rows) % count)).unflatten(0, (-1, count))
    words = rows[:, 0].clone()
    for i in range(1, count):
        words |= rows[:, i] << bits * i
    return words.transpose(0, dim).contiguous()
