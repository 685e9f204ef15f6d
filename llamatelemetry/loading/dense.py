"""Plain transformers models with the same weights: what a comparison runs beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llamatelemetry.loading.find import load_model


def load_dense(name_or_path: str | Path, *, device: str | torch.device, dtype: torch.dtype) -> Any:
    """The transformers model that load_model makes, with every packed weight expanded to dtype.

    Raises:
        ModelFileError: in one sentence

    Example:
        >>> load_dense(directory, device="cpu", dtype=torch.bfloat16).dtype
        torch.bfloat16
    """
    return load_model(name_or_path, device=device, dtype=dtype, dequantize=True).model
