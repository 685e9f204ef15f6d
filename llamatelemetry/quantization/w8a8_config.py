"""What config.json says of linears of a byte a weight, as other readers of them take it."""

from __future__ import annotations

from typing import Any

import torch

from llamatelemetry.quantization.rows import RowFormat

_KINDS = {
    torch.int8: ("int", "int-quantized"),
    torch.float8_e4m3fn: ("float", "float-quantized"),
}


def quantization_config(kind: RowFormat, dense: list[str]) -> dict[str, Any]:
    """The field of that name: compressed-tensors' by token, or of blocks DeepSeek's fp8.

    Args:
        kind: how the linears take their rows.
        dense: names of the linears that are not quantised.
    """
    if kind.block is not None:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [kind.block, kind.block],
            "modules_to_not_convert": dense,
        }
    of_codes, format = _KINDS[kind.dtype]
    common = {"num_bits": 8, "type": of_codes, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": dense,
    }
