"""Modules over quantised weights; the names are loaded when they are first used."""

from typing import TYPE_CHECKING

from llamatelemetry._lazy import lazy_names

if TYPE_CHECKING:
    from llamatelemetry.quantization.w8a8 import W8A8Linear as W8A8Linear
    from llamatelemetry.quantization.w8a8 import quantize_w8a8 as quantize_w8a8

__getattr__, __dir__, __all__ = lazy_names(__name__, {"w8a8": ("W8A8Linear", "quantize_w8a8")})
