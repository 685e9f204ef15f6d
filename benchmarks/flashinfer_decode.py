"""FlashInfer's decode over pages as a baseline, where flashinfer-python is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 128 << 20  # as its documentation recommends


@cache
def workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def flashinfer_baseline(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, *_: Tensor
) -> dict[str, Callable[..., Any]]:
    """On tensor cores, planned before anything is timed; nothing where it is not installed.

    Shapes as of bench_attention.py's decode cases, q [batch, 1, heads, head_dim]. What it returns
    takes the same tensors, with the same table and lengths.
    """
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page_size, num_heads_kv, head_dim = keys.shape[1:]
    used = ((lengths + page_size - 1) // page_size).tolist()
    indices = torch.cat([row[:count] for row, count in zip(table, used, strict=True)])
    starts = torch.tensor([0, *used], device=q.device).cumsum(0).int()
    last = ((lengths - 1) % page_size + 1).int()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace(q.device), "NHD", use_tensor_cores=True, backend="fa2"
    )
    sizes = (q.shape[2], num_heads_kv, head_dim, page_size)
    wrapper.plan(starts, indices, last, *sizes, q_data_type=q.dtype, kv_data_type=keys.dtype)

    def decode(q: Tensor, keys: Tensor, values: Tensor, *_: Tensor) -> Tensor:
        return wrapper.run(q[:, 0], (keys, values))[:, None]

    return {"FlashInfer": decode}
