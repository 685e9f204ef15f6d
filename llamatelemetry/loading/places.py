"""Where a model goes: its device and the dtype of its activations, as users name them."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def usable_device(device: Any) -> torch.device:
    """The device that is meant.

    Raises:
        ValueError: neither the CPU nor a GPU that torch can use.
    """
    rule = "load_model: device must be cpu, cuda or cuda:N"
    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"{rule}, got {device!r:.80}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{rule}, got {device!r:.80}") from None
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ValueError(f"{rule}, got {str(found)!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= count:
        there = f"{count} of them" if count else "none"
        raise ValueError(f"{rule} of a GPU that torch can use, and it finds {there}; got {found}")
    return found


def usable_dtype(dtype: Any) -> torch.dtype | None:
    """The dtype that is meant; None stays None.

    Raises:
        ValueError: none that our ops compute in.
    """
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, dtype)
    if dtype is None or dtype in DTYPES.values():
        return dtype
    raise ValueError(f"load_model: dtype must be one of {', '.join(DTYPES)}, got {dtype!r:.80}")
