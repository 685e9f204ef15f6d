"""Typed wrappers of torch.ops.llamatelemetry, a module a room; reference.py is their semantics."""

from llamatelemetry.ops.cache import append_kv_, copy_blocks_
from llamatelemetry.ops.norm import rms_norm
from llamatelemetry.ops.quant import dequantize

__all__ = ["append_kv_", "copy_blocks_", "dequantize", "rms_norm"]
