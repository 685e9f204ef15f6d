"""Typed wrappers of torch.ops.llamatelemetry, a module a room; reference.py is their semantics."""

from llamatelemetry.ops.norm import rms_norm

__all__ = ["rms_norm"]
