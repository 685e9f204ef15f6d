"""What patch has replaced in a model, kept true while the model changes."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class PatchReport:
    """What patch replaced, and what it did not.

    Attributes:
        replaced: how often each piece stands for a module
        refused: module name -> why it stays as it was, or why its own forward runs again since it
            was changed, until the replacement can follow
        not_packed: why the engine cannot run the model although every piece that it needs stands;
            None if it can, or if refused says why

    Example:
        >>> PatchReport().refused
        {}
    """

    replaced: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)
    not_packed: str | None = None
    _said: set[str] = field(default_factory=set, repr=False)

    def leave(self, name: str, reason: str) -> None:
        """Notes that a module that was replaced runs its own forward; each reason is said once."""
        self.refused[name] = reason
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"patch: {name} runs its own forward: {reason}", stacklevel=2)

    def become(self, other: PatchReport) -> None:
        """Takes over what a later patch of the same model reports."""
        self.replaced, self.refused = other.replaced, other.refused
        self.not_packed = other.not_packed

    def come_back(self, name: str) -> None:
        """Notes that the replacement stands for a module again."""
        self.refused.pop(name, None)
