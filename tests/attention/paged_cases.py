"""Cases of paged_attention, torch's own attention over them, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tolerance import assert_within_2x
from torch import Tensor

from llamatelemetry.ops import paged_attention, reference
from llamatelemetry.ops.reference.cache import quantised


@dataclass(frozen=True)
class Case:
    """What paged_attention takes; tensors for the op, then host sizes."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int

    def tensors(self):
        return (
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_table,
            self.cache_seqlens,
            self.cu_seqlens_q,
        )

    def run(self, **options):
        return paged_attention(*self.tensors(), max_seqlen_q=self.max_seqlen_q, **options)

    def reference(self, dtype, **options):
        q, k_cache, v_cache, *lengths = self.tensors()
        return reference.paged_attention(
            q.to(dtype), k_cache.to(dtype), v_cache.to(dtype), *lengths, **options
        )


def random_case(
    device, dtype, sequences, heads=(6, 2), head_dim=64, page_size=16, max_blocks=None
) -> Case:
    """Sequences of (queries, keys). Pages are shuffled, unused pages and slots past a sequence's
    end NaN, unused table entries absurd ids; q is a slice of a merged qkv."""
    num_pages = [-(-keys // page_size) for _, keys in sequences]
    max_blocks = max_blocks or max([*num_pages, 0]) + 2
    ids = torch.randperm(sum(num_pages) + 3, dtype=torch.int32, device=device)
    ids = ids.split([*num_pages, 3])
    like = {"dtype": torch.int32, "device": device}
    table = torch.full((len(sequences), max_blocks), 2**31 - 1, **like)
    table[:, 1::2] = -7
    shape = (2, sum(num_pages) + 3, page_size, heads[1], head_dim)
    caches = torch.full(shape, torch.nan, dtype=dtype, device=device)
    for row, pages, (_, keys) in zip(table, ids, sequences, strict=False):
        row[: len(pages)] = pages
        filled = caches.new_full((2, len(pages) * page_size, *shape[3:]), torch.nan)
        filled[:, :keys] = torch.randn(2, keys, *shape[3:], device=device)
        caches[:, pages] = filled.view(2, len(pages), *shape[2:])
    queries = torch.tensor([0, *(queries for queries, _ in sequences)])
    qkv = torch.randn(int(queries.sum()), heads[0] + 2 * heads[1], head_dim, device=device)
    return Case(
        qkv.to(dtype)[:, : heads[0]],
        *caches,
        table,
        torch.tensor([keys for _, keys in sequences], **like),
        queries.cumsum(0).int().to(device),
        int(queries.max()),
    )


def eight_bit(case: Case, stored: torch.dtype) -> tuple[Case, dict[str, Tensor]]:
    """The case with its caches rounded, and their scales; NaN stands in scales alone."""
    k, v = (quantised(cache, stored) for cache in (case.k_cache, case.v_cache))
    caches = (x.view(torch.uint8).masked_fill(s.isnan().unsqueeze(-1), 7) for x, s in (k, v))
    k_cache, v_cache = (x.view(stored) for x in caches)
    return replace(case, k_cache=k_cache, v_cache=v_cache), {"k_scales": k[1], "v_scales": v[1]}


def sdpa(case: Case, causal=True, window_size=(-1, -1), softmax_scale=None) -> Tensor:
    """torch's own attention, sequence by sequence, in the case's dtype."""
    left, right = window_size[0], 0 if causal else window_size[1]
    out = torch.zeros_like(case.q)
    starts = case.cu_seqlens_q.tolist()
    for b, keys in enumerate(case.cache_seqlens.tolist()):
        queries = slice(starts[b], starts[b + 1])
        count = starts[b + 1] - starts[b]
        if count == 0 or keys == 0:
            continue
        blocks = case.block_table[b, : -(-keys // case.k_cache.shape[1])]
        k, v = (c[blocks].flatten(0, 1)[:keys] for c in (case.k_cache, case.v_cache))
        positions = torch.arange(count, device=case.q.device) + keys - count
        distance = torch.arange(keys, device=case.q.device) - positions[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= (distance <= right) if right >= 0 else seen
        seen &= (-distance <= left) if left >= 0 else seen
        out[queries] = torch.nn.functional.scaled_dot_product_attention(
            case.q[queries].transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=seen,
            scale=softmax_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out


def assert_right(case: Case, **options):
    out, lse = case.run(**options)
    for name in ("backend", "num_splits", "split_size"):
        options.pop(name, None)
    out64, lse64 = case.reference(torch.float64, **options)
    out32, lse32 = case.reference(torch.float32, **options)
    if options.get("softcap") or options.keys() & {"sinks", "alibi_slopes"}:
        same_dtype = out32.to(case.q.dtype)
    else:
        options.pop("softcap", None)
        same_dtype = sdpa(case, **options)
    assert out.is_contiguous()
    assert_within_2x(out, same_dtype, out64)
    assert_within_2x(lse, lse32, lse64)
    return out, lse
