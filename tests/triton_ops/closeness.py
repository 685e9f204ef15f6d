"""tolerance's rule, and a wider one where Triton's interpreter rounds bfloat16."""

from __future__ import annotations

import os

import torch
from tolerance import assert_within_2x
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def assert_close(ours: Tensor, same_dtype: Tensor, ref64: Tensor) -> None:
    """assert_within_2x; the interpreter cuts off the bits of bfloat16 that a GPU rounds, so each
    rounding on the way may cost a whole unit of the last place."""
    if not INTERPRETED or ours.dtype != torch.bfloat16:
        assert_within_2x(ours, same_dtype, ref64)
        return
    assert ours.dtype == same_dtype.dtype
    unit = torch.finfo(torch.bfloat16).eps * ref64.abs().max().item()
    error, torch_error = ((x.double() - ref64).abs().max().item() for x in (ours, same_dtype))
    assert error <= 4 * torch_error + 3 * unit, f"error {error:.3g}, torch's {torch_error:.3g}"
