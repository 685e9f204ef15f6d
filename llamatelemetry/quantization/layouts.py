"""What a directory's quantization_config says of how its linears are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamatelemetry.quantization import bitsandbytes, mxfp4
from llamatelemetry.quantization.fields import two_sizes

# quant_method in config.json
METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "bitsandbytes")
_BLOCK = (128, 128)  # of W8A8Linear


@dataclass(frozen=True)
class Layout:
    """How a checkpoint keeps a linear.

    Attributes:
        method: one of METHODS
        bits: of a code, 4 or 8
        zero_added: what is added to a stored zero point: 1 in the first version of GPTQ's files
        bytes_apart: whether a weight is an int8 or float8_e4m3fn tensor, a code a byte
        block: (rows, columns) that share a scale, of such weights; None: a row or all
        takes_rows: whether the format has a linear's input quantised at every call as W8A8Linear
            does it: a scale a row, or with blocks of 128 x 128 for each 128 values of it
    """

    method: str
    bits: int
    zero_added: int = 0
    bytes_apart: bool = False
    block: tuple[int, int] | None = None
    takes_rows: bool = False

    @property
    def signs(self) -> tuple[str, ...]:
        """Tensors any of which tells a quantised linear, the usual one first."""
        if self.method == "mxfp4":
            return (mxfp4.SIGN,)
        if self.method == "bitsandbytes":
            return bitsandbytes.SIGNS[self.bits]
        if self.method == "fp8":
            return ("weight_scale_inv", "weight_scale")  # AutoFP8 writes the latter
        if self.bytes_apart:
            return ("weight_scale",)
        return ("weight_packed" if self.method == "compressed-tensors" else "qweight",)

    @property
    def tensors(self) -> frozenset[str]:
        """All that a linear may have but its bias; scales of its input are not used."""
        if self.method == "mxfp4":
            return mxfp4.TENSORS
        if self.method == "bitsandbytes":
            return frozenset(bitsandbytes.TENSORS[self.bits])
        if self.bytes_apart:
            others = ("weight_zero_point", "input_scale", "activation_scale")
            return frozenset(("weight", *self.signs, *others))
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
        version = _first(quantization, ("checkpoint_format", "format"), "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise ValueError(f"GPTQ's format must be gptq or gptq_v2, got {version}")
        return Layout("gptq", bits, 0 if version == "gptq_v2" else 1)
    if method == "awq":
        version = _first(quantization, ("version", "format"), "gemm")
        if version != "gemm":
            raise ValueError(f"AWQ's version must be gemm, got {version}")
        return Layout("awq", _bits(quantization.get("bits", quantization.get("w_bit")), (4,)))
    if method == "mxfp4":
        return Layout(method, 4)
    if method == "bitsandbytes":
        bits = 8 if quantization.get("load_in_8bit") else 4
        return Layout(method, bits, bytes_apart=bits == 8)
    if method == "fp8":
        block = _block("weight_block_size", quantization.get("weight_block_size"))
        takes_rows = block == _BLOCK and quantization.get("activation_scheme") == "dynamic"
        return Layout("fp8", 8, bytes_apart=True, block=block, takes_rows=takes_rows)
    if method == "compressed-tensors":
        format = quantization.get("format")
        if format in ("int-quantized", "float-quantized", "naive-quantized"):
            block = _compressed_block(quantization)
            kind = "int" if format == "int-quantized" else "float"
            takes_rows = _takes_rows(quantization, kind, block)
            return Layout(method, 8, bytes_apart=True, block=block, takes_rows=takes_rows)
        return Layout("compressed-tensors", _compressed_bits(quantization))
    raise ValueError(f"quant_method must be one of {', '.join(METHODS)}, got {method!r}")


def has_static_inputs(quantization: Mapping[str, Any]) -> bool:
    """Whether inputs of linears are to be quantised by scales that were found beforehand.

    Raises:
        ValueError: config_groups are not as compressed-tensors has them.
    """
    if quantization.get("quant_method") == "fp8":
        return quantization.get("activation_scheme") == "static"
    if quantization.get("quant_method") != "compressed-tensors":
        return False
    inputs = [one for _, one in _groups(quantization) if isinstance(one, Mapping)]
    return any(not one.get("dynamic") for one in inputs)


def _first(quantization: Mapping[str, Any], names: tuple[str, ...], otherwise: str) -> str:
    """The first of these fields that is set, in lower case as transformers reads them."""
    return str(next(filter(None, map(quantization.get, names)), otherwise)).lower()


def _block(name: str, sizes: Any) -> tuple[int, int] | None:
    return None if sizes is None else two_sizes(name, sizes)


def _bits(bits: Any, known: tuple[int, ...]) -> int:
    if bits not in known:
        raise ValueError(f"bits must be {' or '.join(map(str, known))}, got {bits}")
    return int(bits)


def _compressed_bits(quantization: Mapping[str, Any]) -> int:
    format = quantization.get("format")
    if format != "pack-quantized":
        raise ValueError(f"the format of compressed-tensors must be pack-quantized, got {format}")
    groups = _groups(quantization)
    bits = [weights.get("num_bits") for weights, _ in groups]
    if not bits or any(one != bits[0] for one in bits) or any(inputs for _, inputs in groups):
        raise ValueError(
            "config_groups must quantise weights alone, all in as many bits, got "
            f"{sorted(set(map(str, bits)))} bits"
        )
    return _bits(bits[0], (4, 8))


def _compressed_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    blocks = [
        _block("block_structure", weights.get("block_structure") or ())
        if weights.get("strategy") == "block"
        else None
        for weights, _ in _groups(quantization)
    ]
    if len(set(blocks)) > 1:
        raise ValueError(f"config_groups must have one block_structure, got {blocks}")
    return blocks[0] if blocks else None


def _takes_rows(quantization: Mapping[str, Any], kind: str, block: tuple[int, int] | None) -> bool:
    """Whether each of config_groups quantises its inputs as W8A8Linear does."""
    if block not in (None, _BLOCK):
        return False
    strategy = "token" if block is None else "group"
    expected = {"num_bits": 8, "type": kind, "dynamic": True, "symmetric": True}
    expected |= {"strategy": strategy} | ({"group_size": _BLOCK[1]} if block else {})
    groups = _groups(quantization)
    return bool(groups) and all(
        isinstance(inputs, Mapping)
        and all(inputs.get(key) == value for key, value in expected.items())
        for _, inputs in groups
    )


def _groups(quantization: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Any]]:
    """What each of config_groups says of its weights, and of its inputs."""
    groups = quantization.get("config_groups") or {}
    known = isinstance(groups, Mapping)
    found = [group or {} for group in groups.values()] if known else []
    known = known and all(isinstance(group, Mapping) for group in found)
    weights = [group.get("weights") or {} for group in found] if known else []
    if not known or not all(isinstance(one, Mapping) for one in weights):
        raise ValueError(f"config_groups must be groups by name, with weights each, got {groups}")
    inputs = [group.get("input_activations") for group in found]
    return list(zip(weights, inputs, strict=True))
