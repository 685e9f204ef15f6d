"""What a directory's quantization_config says of how its linears are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamatelemetry.quantization import mxfp4

METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "mxfp4")  # quant_method in config.json


@dataclass(frozen=True)
class Layout:
    """How a checkpoint keeps a linear.

    Attributes:
        method: "gptq", "awq" or "compressed-tensors"
        bits: of a code, 4 or 8
        zero_added: what is added to a stored zero point: 1 in the first version of GPTQ's files
        bytes_apart: whether a weight is an int8 or float8_e4m3fn tensor, a code a byte
        block: (rows, columns) that share a scale, of such weights; None: a row or all
    """

    method: str
    bits: int
    zero_added: int = 0
    bytes_apart: bool = False
    block: tuple[int, int] | None = None

    @property
    def sign(self) -> str:
        """The tensor that tells a quantised linear."""
        if self.method == "mxfp4":
            return mxfp4.SIGN
        if self.bytes_apart:
            return "weight_scale_inv" if self.method == "fp8" else "weight_scale"
        return "weight_packed" if self.method == "compressed-tensors" else "qweight"

    @property
    def tensors(self) -> frozenset[str]:
        """All that a linear may have but its bias; scales of its input are not used."""
        if self.method == "mxfp4":
            return mxfp4.TENSORS
        if self.bytes_apart:
            return frozenset(("weight", self.sign, "input_scale", "activation_scale"))
        if self.method == "compressed-tensors":
            names = ("packed", "scale", "zero_point", "shape", "g_idx")
            return frozenset(f"weight_{name}" for name in names)
        return frozenset(("qweight", "qzeros", "scales", "g_idx"))


def layout_of(quantization: Mapping[str, Any]) -> Layout:
    """What config.json's quantization_config describes.

    Raises:
        ValueError: what of it our kernels do not read.
    """
    method = quantization.get("quant_method")
    if method == "gptq":
        bits = _bits(quantization.get("bits"), (4, 8))
        second = quantization.get("checkpoint_format") == "gptq_v2"
        return Layout("gptq", bits, 0 if second else 1)
    if method == "awq":
        version = str(quantization.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(f"AWQ's version must be gemm, got {version}")
        return Layout("awq", _bits(quantization.get("bits", quantization.get("w_bit")), (4,)))
    if method == "mxfp4":
        return Layout(method, 4)
    if method == "fp8":
        block = quantization.get("weight_block_size")
        sizes = None if block is None else (int(block[0]), int(block[1]))
        return Layout("fp8", 8, bytes_apart=True, block=sizes)
    if method == "compressed-tensors":
        format = quantization.get("format")
        if format in ("int-quantized", "float-quantized", "naive-quantized"):
            return Layout("compressed-tensors", 8, bytes_apart=True)
        return Layout("compressed-tensors", _compressed_bits(quantization))
    raise ValueError(f"quant_method must be one of {', '.join(METHODS)}, got {method!r}")


def _bits(bits: Any, known: tuple[int, ...]) -> int:
    if bits not in known:
        raise ValueError(f"bits must be {' or '.join(map(str, known))}, got {bits}")
    return int(bits)


def _compressed_bits(quantization: Mapping[str, Any]) -> int:
    format = quantization.get("format")
    if format != "pack-quantized":
        raise ValueError(f"the format of compressed-tensors must be pack-quantized, got {format}")
    groups = quantization.get("config_groups") or {}
    weights = [(group or {}).get("weights") or {} for group in groups.values()]
    bits = {one.get("num_bits") for one in weights}
    if len(bits) != 1 or any((group or {}).get("input_activations") for group in groups.values()):
        raise ValueError(
            "config_groups must quantise weights alone, all in as many bits, got "
            f"{sorted(map(str, bits))} bits"
        )
    return _bits(bits.pop(), (4, 8))
