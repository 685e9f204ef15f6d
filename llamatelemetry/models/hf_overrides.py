"""What enable_flash_attention's configuration changes in one module, and whether it is in force."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

OVERRIDES = "_llamatelemetry_overrides"  # attribute of a module: an Overrides


class Overrides(NamedTuple):
    """What enable_flash_attention's configuration changes in a module's attention."""

    softmax_scale: float | None = None
    dropout_p: float = 0.0
    window: tuple[int, int] = (-1, -1)
    causal: bool = True


def in_force(module: nn.Module) -> str | None:
    """What a configuration changes in a module as it is, training or not; None if nothing."""
    overrides: Overrides | None = module.__dict__.get(OVERRIDES)
    if overrides is None:
        return None
    if not module.training:
        overrides = overrides._replace(dropout_p=0.0)
    changed = [
        f"{name}={value!r}"
        for name, value in overrides._asdict().items()
        if value != Overrides._field_defaults[name]
    ]
    return f"FlashAttentionConfig's {', '.join(changed)}" if changed else None
