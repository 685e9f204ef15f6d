"""What transformers' mask functions and configs say, taken apart."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

_ADDS_MASKS: dict[type, bool] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def adds_masks(kind: type) -> bool:
    """Whether models of a config's class may add masks to scores: those that take no sdpa."""
    if kind not in _ADDS_MASKS:
        file = sys.modules.get(kind.__module__.replace("configuration_", "modeling_"))
        models = [x for x in vars(file).values() if hasattr(x, "_supports_sdpa")] if file else []
        own = [x for x in models if file is not None and x.__module__ == file.__name__]
        _ADDS_MASKS[kind] = bool(own) and not any(x._supports_sdpa for x in own)
    return _ADDS_MASKS[kind]


def rules_of(mask_function: Any, seqlen: int) -> tuple[bool, int, int] | None:
    """(causal, left, right) of a mask function of transformers, or None for another kind of rule.

    transformers composes closures; they are taken apart again, so that nothing is guessed.
    A chunk or window that no sequence of seqlen tokens leaves is no rule.
    """
    if mask_function is causal_mask_function:
        return True, -1, -1
    if mask_function is bidirectional_mask_function:
        return False, -1, -1
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    cells = (cell.cell_contents for cell in mask_function.__closure__ or ())
    values = dict(zip(mask_function.__code__.co_freevars, cells, strict=True))
    kind = mask_function.__qualname__.partition(".")[0]
    if kind == "and_masks":
        causal, left, right = False, -1, -1
        for part in values["mask_functions"]:
            rules = rules_of(part, seqlen)
            if rules is None:
                return None
            causal = causal or rules[0]
            left, right = (
                b if a < 0 else a if b < 0 else min(a, b)
                for a, b in zip((left, right), rules[1:], strict=True)
            )
        return causal, left, right
    if kind == "sliding_window_overlay":
        window = int(values["sliding_window"])
        return False, window - 1 if window < seqlen else -1, -1
    if kind == "sliding_window_bidirectional_overlay":
        window = int(values["sliding_window"])
        reach = window if window + 1 < seqlen else -1
        return False, reach, reach
    if kind == "chunked_overlay" and seqlen <= int(values["chunk_size"]):
        return False, -1, -1
    return None


def traced_rules(
    mask_function: Any, local_size: int | None, may_skip: bool, config: Any, kv_length: int
) -> tuple[bool, int, int] | None:
    """rules_of while a graph is traced, where closures cannot be looked into."""
    if mask_function is causal_mask_function:
        return True, -1, -1
    if mask_function is bidirectional_mask_function:
        return False, -1, -1
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    # A mask that may not be skipped has more in it than causality and the window.
    if local_size is not None and may_skip and local_size == window and local_size != chunk:
        return True, local_size - 1 if local_size < kv_length else -1, -1
    return None
