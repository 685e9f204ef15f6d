"""Hugging Face models with our ops in place of their modules."""

from typing import TYPE_CHECKING

from llamatelemetry._lazy import lazy_names

if TYPE_CHECKING:
    from llamatelemetry.models.patching import PatchReport as PatchReport
    from llamatelemetry.models.patching import patch as patch
    from llamatelemetry.models.patching import unpatch as unpatch

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"patching": ("PatchReport", "patch", "unpatch")}
)
