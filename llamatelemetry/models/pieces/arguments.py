"""What the forwards of attentions and layers are called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

# What the forward of an attention or a layer may be called with. transformers 5.24 renamed
# past_key_values to cache; a module's own signature says which of the two it has.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
# Of decoders that can have an encoder beside them: what hands a call over to the module's forward.
ENCODER_NAMES = ("encoder_hidden_states", "encoder_attention_mask", "key_value_states")
KNOWN_TO_LAYERS = frozenset(
    {
        "hidden_states",
        "attention_mask",
        "position_embeddings",
        "position_ids",
        "use_cache",
        "output_attentions",
        *ENCODER_NAMES,
        *CACHE_NAMES,
    }
)


def parameters_of(forward: Callable[..., Any], known: frozenset[str]) -> tuple[str, ...]:
    """Names of forward's parameters, each of which must be a known one."""
    names = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name not in known:
            raise ValueError(
                f"forward's parameters must be among {sorted(known)}, got {parameter.name!r}"
            )
        names.append(parameter.name)
    if known.issuperset(CACHE_NAMES) and not set(CACHE_NAMES) & set(names):
        raise ValueError(
            f"forward must take the cache as one of {', '.join(CACHE_NAMES)}, got {names}"
        )
    return tuple(names)


def without_encoder(call: dict[str, Any]) -> bool:
    """Takes an encoder's arguments out of a call, and says whether it had none."""
    return all(call.pop(name, None) is None for name in ENCODER_NAMES)


def take_cache(call: dict[str, Any]) -> Any:
    """Takes the cache out of a call, under whichever of its names it comes."""
    given = [call.pop(name, None) for name in CACHE_NAMES]
    return next((cache for cache in given if cache is not None), None)
