"""What transformers' models list of their tensors by name, and how it reads those lists."""

from __future__ import annotations

import re
from typing import Any

import torch

# Tensors that nothing here needs: tables that a model makes itself, and scales of activations and
# of a cache in fewer bits, both of which stay as they are.
_NOT_NEEDED = (
    *("inv_freq", "k_scale", "v_scale", "kv_scale"),
    *("activation_scale", "input_scale", "input_global_scale"),
)
_LAYER = re.compile(r".*?\.\d+(?=\.)")


def loaded_dtype(model: Any, name: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What a file's tensor becomes in a model of this dtype.

    As transformers does it, what a model lists stays float32, as a router's corrections do.
    """
    if not stored.is_floating_point:
        return stored
    patterns = [pattern.replace("*", ".*") for pattern in names_in_float32(model, dtype)]
    return torch.float32 if any(re.search(pattern, name) for pattern in patterns) else dtype


def names_in_float32(model: Any, dtype: torch.dtype) -> list[str]:
    """What a model lists as float32 for this dtype."""
    if dtype not in (torch.float16, torch.bfloat16):
        return []
    names = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names += list(getattr(model, "_keep_in_fp32_modules", None) or ())
    return names


def is_ignored(model: Any, name: str) -> bool:
    """Whether nothing is lost with a tensor that the model has no place for."""
    if name.endswith(_NOT_NEEDED):
        return True
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def is_of_ignored_layer(model: Any, name: str) -> bool:
    """Whether a tensor is left out with a whole layer that the model does not have.

    GLM-4's list names layer 46, the one past the last of its smaller model and one of the larger.
    """
    layer = _LAYER.match(name)
    if not is_ignored(model, name):
        return False
    try:
        model.get_submodule(layer[0] if layer else name.rpartition(".")[0])
    except AttributeError:
        return True
    return False
