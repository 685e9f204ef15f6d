"""The one rule of closeness: within twice torch's own error in the same dtype.

max|ours - ref64| <= 2 * max|torch same dtype - ref64| + eps, NaN and inf in the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_2x(ours: Tensor, same_dtype: Tensor, ref64: Tensor) -> None:
    """ours and same_dtype are two results in one dtype, ref64 is the float64 truth."""
    assert ours.shape == ref64.shape, f"shape {tuple(ours.shape)}, want {tuple(ref64.shape)}"
    assert ours.dtype == same_dtype.dtype, f"dtype {ours.dtype}, want {same_dtype.dtype}"
    a, b, r = ours.double(), same_dtype.double(), ref64.to(ours.device)
    finite = torch.isfinite(b)
    assert torch.equal(torch.isnan(a), torch.isnan(b)), "NaN in other places"
    assert torch.equal(a[torch.isinf(b)], b[torch.isinf(b)]), "inf in other places"
    a, b, r = a[finite], b[finite], r[finite]
    if a.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps * r.abs().max().item()
    error, torch_error = (a - r).abs().max().item(), (b - r).abs().max().item()
    assert error <= 2 * torch_error + eps, (
        f"error {error:.3g}, torch's {torch_error:.3g} + {eps:.3g}"
    )
