"""Routed experts in MXFP4 as gpt-oss's directories have them: blocks of 32 codes, exponents apart.

Byte i of a block holds weights 2 i (low) and 2 i + 1; rows of gate and up take turns. Source: the
directories of openai/gpt-oss, and transformers' convert_moe_packed_tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llamatelemetry import ops
from llamatelemetry.ops.formats import QuantFormat
from llamatelemetry.quantization.experts import PARTS, QuantExperts

SIGN = "gate_up_proj_blocks"
TENSORS = frozenset(
    f"{part}_proj_{kind}" for part in ("gate_up", "down") for kind in ("blocks", "scales", "bias")
)


def mxfp4_experts(
    like: Any, found: Mapping[str, Tensor], dtype: torch.dtype, exact: bool
) -> QuantExperts:
    """A layer's experts from its tensors, which stay packed.

    Args:
        like: transformers' module of them, on meta.
        found: TENSORS by name: blocks [experts, n, k / 32, 16], scales [experts, n, k / 32], bias.
        dtype: of the biases.
        exact: as in QuantExperts.

    Raises:
        ValueError: a tensor that is missing or not of that shape, or experts that have no biases or
            whose gate and up do not take turns.
    """
    if not isinstance(getattr(like, "gate_up_proj", None), Tensor) or like.is_concatenated:
        raise ValueError("MXFP4 is read for routed experts as gpt-oss has them alone")
    if missing := sorted(TENSORS - found.keys()):
        raise ValueError(f"{missing[0]} is missing")
    parts: dict[str, Tensor] = {}
    for name, places in (("gate_up", ("gate", "up")), ("down", ("down",))):
        rows = _rows(found[f"{name}_proj_blocks"], found[f"{name}_proj_scales"])
        weight = getattr(like, f"{name}_proj")
        experts, n, k = weight.shape if not like.is_transposed else weight.mT.shape
        bias = found[f"{name}_proj_bias"]
        expected = (experts, n, QuantFormat.MXFP4.row_bytes(k)), (experts, n)
        if (rows.shape, bias.shape) != expected:
            raise ValueError(
                f"{name}_proj must be of {experts} experts of {(n, k)} as config.json says, got "
                f"rows of {tuple(rows.shape)} bytes and biases of {tuple(bias.shape)}"
            )
        for i, place in enumerate(places):
            own = rows[:, i :: len(places)]
            packed = [ops.repack(one.contiguous(), QuantFormat.MXFP4) for one in own]
            parts[f"{place}.weight"] = torch.stack(packed)
            parts[f"{place}.bias"] = bias[:, i :: len(places)].to(dtype).contiguous()
    return QuantExperts(like, parts, dict.fromkeys(PARTS, QuantFormat.MXFP4), exact)


def _rows(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, n, row_bytes] in GGUF's order: the exponent, then 16 weights low and 16 high."""
    if blocks.dtype != torch.uint8 or blocks.dim() != 4 or blocks.shape[:3] != scales.shape:
        raise ValueError(
            f"blocks must be uint8 [experts, n, k / 32, 16] with a scale each, got {blocks.dtype} "
            f"of {tuple(blocks.shape)} and scales of {tuple(scales.shape)}"
        )
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    low, high = codes.chunk(2, -1)
    return torch.cat((scales.view(torch.uint8).unsqueeze(-1), low | high << 4), -1).flatten(2)
