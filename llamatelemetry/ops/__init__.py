"""Typed wrappers of torch.ops.llamatelemetry, a module a room; reference.py is their semantics."""

from llamatelemetry.ops.norm import rms_norm
from llamatelemetry.ops.quant import dequantize

__all__ = ["dequantize", "rms_norm"]
