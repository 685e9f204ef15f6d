"""paged_attention against scaled_dot_product_attention on contiguous keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from llamatelemetry.ops import paged_attention

PAGE_SIZE = 16


def ours(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, starts: Tensor):
    return paged_attention(q, keys, values, table, lengths, starts, max_seqlen_q=len(q))[0]


def sdpa(q: Tensor, keys: Tensor, values: Tensor, *_: Tensor) -> Tensor:
    """One sequence whose pages lie in order: as contiguous keys."""
    group = q.shape[1] // keys.shape[2]
    q, k, v = (x.flatten(0, -3).transpose(0, 1)[None] for x in (q[:, None], keys, values))
    if q.shape[2] > 1:  # grouped heads would keep torch from its fused kernel
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        bias = causal_lower_right(q.shape[2], k.shape[2])  # as is_causal where both are the same
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return out[0].transpose(0, 1)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    heads_q, heads_kv, head_dim = (9, 3, 64) if device.type == "cpu" else (32, 8, 128)
    dtypes = [torch.bfloat16] if quick or device.type == "cuda" else [torch.float32, torch.bfloat16]
    sizes = [(1, 1024), (128, 128)] if quick else [(1, 128), (1, 1024), (1, 4096)]
    if not quick:
        sizes += [(128, 128), (1024, 1024)]
    if not quick and device.type == "cuda":
        sizes += [(8192, 8192), (128, 16384), (2048, 16384)]
    for dtype in dtypes:
        for num_queries, num_keys in sizes:
            num_pages = num_keys // PAGE_SIZE
            shape = (num_pages, PAGE_SIZE, heads_kv, head_dim)
            q = torch.randn(num_queries, heads_q, head_dim, device=device).to(dtype)
            keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            lengths = torch.tensor([num_keys], dtype=torch.int32, device=device)
            starts = torch.tensor([0, num_queries], dtype=torch.int32, device=device)
            is_decode = num_queries == 1
            pairs = num_queries * (2 * num_keys - num_queries) // 2  # a query, a key that it sees
            yield Case(
                f"{num_queries} of {num_keys} {heads_q}/{heads_kv}x{head_dim} {str(dtype)[6:]}",
                inputs=(
                    q,
                    keys,
                    values,
                    torch.arange(num_pages, dtype=torch.int32, device=device)[None],
                    lengths,
                    starts,
                ),
                ours=ours,
                baselines={"sdpa": sdpa},
                bytes_moved=keys.nbytes + values.nbytes if is_decode else None,
                flops=None if is_decode else 4 * heads_q * head_dim * pairs,
                flops_dtype=torch.float32 if device.type == "cpu" else dtype,
            )


if __name__ == "__main__":
    main("attention", cases)
