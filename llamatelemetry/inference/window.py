"""How far back a model's layers look."""

from __future__ import annotations

from typing import Any


def window_of(model: Any) -> int | None:
    """Keys that a token of a patched model looks at in any of its layers, its own included; None
    where one layer looks at all: all layers have the same blocks, so then none may be given back.
    """
    patched = model.__dict__.get("_llamatelemetry")
    if patched is None or (decoder := patched.decoder) is None:
        return None
    widest: int | None = None
    for block in decoder.blocks:
        if (window := block.attention.window_now()) is None:
            return None
        widest = max(window, widest or 0)
    return widest
