"""Attention over transformers' caches by our ops, once it is known which keys each query sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llamatelemetry._native import library
from llamatelemetry.models.hf_plans import PaddedPlan, PadRanges, PadRows, SharedPlan
from llamatelemetry.ops import _contract  # noqa: F401  (loads the library)

# Up to so many queries paged_attention's split over the keys serves the CPU better.
_FEW_QUERIES: int = library.cpu_library.lt_few_queries()


class Scores(NamedTuple):
    """How scores are made of q and k, in the order of the ops' arguments."""

    softmax_scale: float
    causal: bool
    left: int
    right: int
    softcap: float


def dense(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, sinks: Tensor | None
) -> Tensor:
    """No padding: flash_attn, or on the CPU paged_attention where the queries are few."""
    batch, _, seqlen_q, _ = query.shape
    if not query.is_cuda and seqlen_q <= _FEW_QUERIES:
        lengths = torch.full((batch,), key.shape[2], dtype=torch.int32, device=query.device)
        return shared(query, key, value, SharedPlan(None, lengths), scores, sinks)
    q, k, v = (_last_contiguous(x).transpose(1, 2) for x in (query, key, value))
    return torch.ops.llamatelemetry.flash_attn.default(q, k, v, sinks, None, *scores, 0)[0]


def _paged(
    q: Tensor, cache: list[Tensor], table: Tensor, lengths: Tensor, starts: Tensor, longest: int,
    scores: Scores, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """paged_attention with sinks: one more score takes its share of the weights."""
    op = torch.ops.llamatelemetry.paged_attention.default
    out, lse = op(q, *cache, table, lengths, starts, longest, *scores)
    if sinks is None:
        return out
    return (out * torch.sigmoid(lse.t() - sinks).unsqueeze(-1)).to(out.dtype)


def shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SharedPlan,
    scores: Scores,
    sinks: Tensor | None,
) -> Tensor:
    """Attention where all queries are read in one call, in their order."""
    batch, num_heads, seqlen_q, head_dim = query.shape
    cache, table = _pages(key, value, plan.slots)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * seqlen_q
    q = query.transpose(1, 2).reshape(-1, num_heads, head_dim)
    out = _paged(q, cache, table, plan.lengths, starts, seqlen_q, scores, sinks)
    return out.view(batch, seqlen_q, num_heads, head_dim)


def padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PaddedPlan,
    scores: Scores,
    sinks: Tensor | None,
) -> Tensor:
    """Attention where queries that are tokens and queries that are padding see different keys."""
    batch, num_heads, seqlen_q, head_dim = query.shape
    cache, table = _pages(key, value, plan.slots)
    q = query.transpose(1, 2).reshape(-1, num_heads, head_dim)
    tokens, pads = q[plan.order], plan.pads
    token_args = (cache, table, plan.lengths, plan.cu_seqlens_q, seqlen_q, scores, sinks)
    free = scores._replace(causal=False, left=-1, right=-1)
    if plan.num_tokens is None:
        assert isinstance(pads, PadRows)
        out = _paged(tokens, *token_args)[plan.places]
        pad_args = (cache, table, pads.lengths, pads.cu_seqlens_q, seqlen_q, free, sinks)
        pads_out = _paged(q[pads.order], *pad_args)[pads.places]
        out = torch.where(plan.is_token[:, None, None], out, pads_out)
        return out.view(batch, seqlen_q, num_heads, head_dim)
    rest = tokens[plan.num_tokens :]
    out = _paged(tokens[: plan.num_tokens], *token_args)
    if pads is None:
        rest_out = torch.zeros_like(rest)
    elif isinstance(pads, PadRanges):
        per_row, cache = _slots_as_pages(key, value)
        table = (pads.slots + pads.rows[:, None] * per_row).int()
        rest_out = _paged(rest, cache, table, pads.lengths, pads.cu_seqlens_q, 1, free, sinks)
    else:
        pad_args = (cache, table, pads.lengths, pads.cu_seqlens_q, seqlen_q, free, sinks)
        rest_out = _paged(rest, *pad_args)
    return torch.cat([out, rest_out])[plan.places].view(batch, seqlen_q, num_heads, head_dim)


def same_widths(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All as wide as the widest, and that a multiple of 8, by zeros, which change no score."""
    width = (max(query.shape[-1], value.shape[-1]) + 7) // 8 * 8
    q, k, v = (
        x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))
        for x in (query, key, value)
    )
    return q, k, v


def _pages(key: Tensor, value: Tensor, slots: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """K and V as a paged cache, and its table: a page a row, or a page for each of the slots."""
    rows = torch.arange(key.shape[0], device=key.device).unsqueeze(1)
    if slots is None:
        return [_last_contiguous(x).transpose(1, 2) for x in (key, value)], rows.int()
    per_row, cache = _slots_as_pages(key, value)
    return cache, (slots + rows * per_row).int()


def _slots_as_pages(key: Tensor, value: Tensor) -> tuple[int, list[Tensor]]:
    """K and V [batch, heads, slots, head_dim] as [pages, 1, heads, head_dim], and a row's pages.

    Pages overlap in memory where heads are further apart than slots: nothing writes through them.
    """
    batch, num_heads, num_slots, head_dim = key.shape
    row, _, slot, last = key.stride()
    if key.stride() != value.stride() or last != 1 or slot <= 0 or row % slot or num_slots == 1:
        key, value = (x.clone(memory_format=torch.contiguous_format) for x in (key, value))
        row, slot = num_heads * num_slots * head_dim, head_dim
    num_pages = (batch - 1) * (row // slot) + num_slots
    shape, strides = (num_pages, 1, num_heads, head_dim), (slot, slot, key.stride(1), 1)
    return row // slot, [x.as_strided(shape, strides, x.storage_offset()) for x in (key, value)]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
