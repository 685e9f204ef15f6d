"""Typed wrappers of torch.ops.llamatelemetry, a module a room; reference.py is their semantics."""

from llamatelemetry.ops.cache import append_kv_, copy_blocks_
from llamatelemetry.ops.norm import rms_norm
from llamatelemetry.ops.quant import QuantFormat, dequantize, repack, unpack
from llamatelemetry.ops.sampling import sample

__all__ = [
    "QuantFormat",
    "append_kv_",
    "copy_blocks_",
    "dequantize",
    "repack",
    "rms_norm",
    "sample",
    "unpack",
]
