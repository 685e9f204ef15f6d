"""Plain transformers models with the same weights: what a comparison runs beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamatelemetry.models.loading import load_model
from llamatelemetry.models.modules import QuantEmbedding, QuantLinear


def load_dense(name_or_path: str | Path, *, device: str | torch.device, dtype: torch.dtype) -> Any:
    """The transformers model that load_model makes, with every packed weight expanded to dtype.

    Raises: ModelFileError in one sentence
    """
    model = load_model(name_or_path, device=device, dtype=dtype).model
    expand(model, dtype)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


def expand(module: nn.Module, dtype: torch.dtype) -> None:
    """Puts dense modules of dtype in the place of the quantised ones inside module."""
    for name, part in list(module.named_modules()):
        if isinstance(part, (QuantLinear, QuantEmbedding)):
            module.set_submodule(name, part.dense(dtype))
