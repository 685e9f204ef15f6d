"""What tests of quant_linear's kernels for several rows share."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops import QuantFormat, quant_linear, repack, rms_norm
from llamatelemetry.quantization.groups import GroupedWeight


def product(x: Tensor, w: GroupedWeight, n: int, bias: Tensor | None = None) -> Tensor:
    return quant_linear(x, w.packed, w.format, n, bias, False, w.scales, w.zeros)


def assert_one_hot_rows(w: GroupedWeight, weights: Tensor, m: int, dtype: torch.dtype) -> None:
    """m rows of zeros with a one each pick columns of weights [n, k], which w packs."""
    n, k = weights.shape
    picked = torch.randint(0, k, (m,), device=weights.device)
    x = torch.zeros(m, k, device=weights.device, dtype=dtype)
    x[torch.arange(m, device=weights.device), picked] = 1.0
    assert torch.equal(product(x, w, n), weights[:, picked].T.to(dtype))


def assert_repacked_weights_are_seen(m: int, between: bool) -> None:
    """m rows of x over other weights at each call, where the last ones lay.

    Only the wait for the kernel ahead promises that earlier writes are seen, and weights are read
    before it. between: ahead is rms_norm, which lets its successor start early, and not repack.
    """
    format = QuantFormat.Q4_0
    weights = [
        torch.randint(0, 64, (4096, format.row_bytes(4096)), device="cuda", dtype=torch.uint8)
        for _ in range(3)
    ]
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    scale = torch.ones_like(x[0])
    normed = rms_norm(x, scale)
    truths = [
        quant_linear(normed, packed, format, 4096)
        for packed in [repack(rows, format) for rows in weights]
    ]
    assert not torch.equal(*truths[:2])
    places = set()
    for i in range(21):
        packed = repack(weights[i % 3], format)
        out = quant_linear(rms_norm(x, scale) if between else normed, packed, format, 4096)
        places.add(packed.data_ptr())
        del packed  # the next call's lie there
        assert torch.equal(out, truths[i % 3])
    assert len(places) <= 2  # in turns, so that three weights never find their own there
