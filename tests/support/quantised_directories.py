"""Tiny directories as GPTQ, AWQ and compressed-tensors write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from directories import change, tiny_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column bits 4 i .. 4 i + 3 hold


@dataclass(frozen=True)
class Kind:
    """A way to quantise: group 0 is all of a row."""

    method: str
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    sorted_columns: bool = False
    second: bool = False  # checkpoint_format gptq_v2
    whole: torch.dtype | None = None  # of weights that are not packed
    rows: bool = False  # whether inputs are quantised too


KINDS = {
    "gptq": Kind("gptq"),
    "gptq-asymmetric": Kind("gptq", symmetric=False),
    "gptq-act-order": Kind("gptq", symmetric=False, sorted_columns=True),
    "gptq-v2-column": Kind("gptq", group=0, symmetric=False, second=True),
    "gptq-8-bits": Kind("gptq", bits=8),
    "awq": Kind("awq", symmetric=False),
    "packed": Kind("compressed-tensors"),
    "packed-asymmetric": Kind("compressed-tensors", symmetric=False),
    "packed-act-order": Kind("compressed-tensors", sorted_columns=True),
    "packed-8-bits-column": Kind("compressed-tensors", bits=8, group=0),
    "int8-column": Kind("compressed-tensors", group=0, whole=torch.int8),
    "float8-column": Kind("compressed-tensors", group=0, whole=torch.float8_e4m3fn),
    "float8-blocks": Kind("fp8", whole=torch.float8_e4m3fn),
    "float8-tensor": Kind("fp8", group=0, whole=torch.float8_e4m3fn),
}
_FORMATS = {
    None: "pack-quantized",
    torch.int8: "int-quantized",
    torch.float8_e4m3fn: "float-quantized",
}


def write_quantised(path: Path, model: Any, kind: Kind) -> Any:
    """Quantises the linears of a model's layers to random codes and saves them as kind says.

    Returns:
        the model, with the weights that the codes stand for
    """
    model.config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, linear in linears_of(model):
        del tensors[f"{name}.weight"]
        parts = _quantise(linear, kind)
        if kind.method == "gptq" and linear.bias is None and not kind.second:
            parts["bias"] = torch.zeros(linear.out_features)  # as AutoGPTQ writes
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    change(path / "config.json", quantization_config=_config(kind))
    return model


def write_mxfp4(path: Path, model: Any) -> Any:
    """Likewise for a gpt-oss model, whose experts alone are quantised."""
    model.config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tensors = dict(model.state_dict())
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((values, -values))
    for name, module in model.named_modules():
        for part in ("gate_up_proj", "down_proj"):
            if not isinstance(getattr(module, part, None), nn.Parameter):
                continue
            del tensors[f"{name}.{part}"]
            parameter = getattr(module, part)
            experts, k, n = parameter.shape
            codes = torch.randint(16, (experts, n, k), dtype=torch.uint8)
            exponents = torch.randint(118, 124, (experts, n, k // 32), dtype=torch.uint8)
            scales = torch.exp2(exponents.float() - 127).repeat_interleave(32, -1)
            parameter.data = (values[codes.long()] * scales).mT.contiguous()
            pairs = codes.unflatten(-1, (-1, 16, 2))
            tensors[f"{name}.{part}_blocks"] = pairs[..., 0] | pairs[..., 1] << 4
            tensors[f"{name}.{part}_scales"] = exponents
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    change(path / "config.json", quantization_config={"quant_method": "mxfp4"})
    return model


def linears_of(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            yield name, module


def _quantise(linear: nn.Linear, kind: Kind) -> dict[str, Tensor]:
    """The tensors of one linear, whose weight becomes what they stand for."""
    n, k = linear.weight.shape
    if kind.whole is not None:
        return _whole(linear, kind, kind.whole)
    size = kind.group or k
    middle = 2 ** (kind.bits - 1)
    codes = torch.randint(2**kind.bits, (n, k))
    scales = ((0.5 + torch.rand(n, k // size)) * 0.1 / middle).half()
    zeros = torch.full((n, k // size), middle)
    if not kind.symmetric:
        zeros = torch.randint(2**kind.bits, (n, k // size))
    group_of = torch.arange(k) // size
    if kind.sorted_columns:  # those of one input are alike, as they are in a quantiser's files
        group_of = group_of[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
    weight = scales.float()[:, group_of] * (codes - zeros[:, group_of])
    linear.weight.data = weight.to(linear.weight.dtype)
    pack = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[kind.method]
    return pack(kind, codes, scales, zeros, group_of)


def _whole(linear: nn.Linear, kind: Kind, dtype: torch.dtype) -> dict[str, Tensor]:
    """A code a byte; fp8 has a scale for each square of its group's size, or for all."""
    n, k = linear.weight.shape
    codes = (20 * torch.randn(n, k)).to(dtype)
    rows = 1 if kind.method == "compressed-tensors" else kind.group or n
    columns = kind.group or k
    scales = (0.5 + torch.rand(n // rows, k // columns)) / 300
    each = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    linear.weight.data = codes.float() * each
    name = "weight_scale_inv" if kind.method == "fp8" else "weight_scale"
    return {"weight": codes, name: scales}


def _gptq(kind: Kind, codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Any:
    stored = zeros if kind.second else (zeros - 1) % 2**kind.bits
    return {
        "qweight": _words(codes.T, kind.bits, 0),
        "qzeros": _words(stored.T, kind.bits, 1),
        "scales": scales.T,
        "g_idx": group_of.int(),
    }


def _awq(kind: Kind, codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Any:
    def words(values: Tensor) -> Tensor:
        return _words(values.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4, 1)

    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scales.T}


def _compressed(kind: Kind, codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Any:
    found = {
        "weight_packed": _words(codes, kind.bits, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not kind.symmetric:
        found["weight_zero_point"] = _words(zeros, kind.bits, 0)
    if kind.sorted_columns:
        found["weight_g_idx"] = group_of.int()
    return found


def _words(values: Tensor, bits: int, dim: int) -> Tensor:
    """int32 of neighbours along dim, the first in the lowest bits; rows past the end are zero."""
    count = 32 // bits
    values = values.transpose(0, dim).to(torch.int64)
    padded = torch.zeros(-(-len(values) // count) * count, values.shape[1], dtype=torch.int64)
    padded[: len(values)] = values
    words = torch.zeros(len(padded) // count, values.shape[1], dtype=torch.int64)
    for i in range(count):
        words |= padded[i::count] << (bits * i)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.int().transpose(0, dim)


def _config(kind: Kind) -> dict[str, Any]:
    if kind.method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": kind.group, "version": "gemm"}
    if kind.method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": kind.bits,
            "group_size": kind.group or -1,
            "desc_act": kind.sorted_columns,
            "sym": kind.symmetric,
            "checkpoint_format": "gptq_v2" if kind.second else "gptq",
        }
    if kind.method == "fp8":
        blocks = {"weight_block_size": [kind.group] * 2} if kind.group else {}
        return {"quant_method": "fp8", "activation_scheme": "dynamic", **blocks}
    weights = {"num_bits": kind.bits, "group_size": kind.group or None, "type": "int"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if kind.rows:
        type = "int" if kind.whole == torch.int8 else "float"
        inputs = {"num_bits": 8, "type": type, "strategy": "token"}
        group["input_activations"] = inputs | {"dynamic": True, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMATS[kind.whole],
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
