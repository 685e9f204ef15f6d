"""Attention over transformers' caches by our ops, once it is known which keys each query sees."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from llamatelemetry._native import kernels
from llamatelemetry._native.facts import LIMITS
from llamatelemetry.models.hf_layout import KeyLayout
from llamatelemetry.models.hf_plans import (
    PaddedPlan,
    PadRanges,
    PadRows,
    Plan,
    SharedPlan,
    plan_of_layout,
)
from llamatelemetry.ops import _contract  # noqa: F401  (loads the library)

# Up to so many queries paged_attention's split over the keys serves the CPU better.
_FEW_QUERIES: int = LIMITS["max_split_queries"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_SOFTCAP = 10000.0
MAX_HEAD_DIM = 256
_said: set[str] = set()


def is_transformed() -> bool:
    """Whether vmap, jvp or their like are at work, of which our ops know nothing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


class Scores(NamedTuple):
    """How scores are made of q and k, in the order of the ops' arguments."""

    softmax_scale: float
    causal: bool
    left: int
    right: int
    softcap: float


def serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    dropout: float,
    sinks: Tensor | None = None,
) -> bool:
    """Whether our kernels can, the mask aside."""
    width = max(query.shape[-1], value.shape[-1])
    if width > MAX_HEAD_DIM:
        _say_once(
            f"llamatelemetry attention: head_dim must be at most {MAX_HEAD_DIM}, got {width}; "
            "torch's own attention serves these layers"
        )
        return False
    tensors = [x for x in (query, key, value, sinks) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    kind = query.device.type
    return (
        not dropout
        and not is_transformed()
        and (kind == "cpu" or (kind == "cuda" and "flash_attn" not in kernels.without_cuda))
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and key.shape[:3] == value.shape[:3]
        and 0.0 <= scores.softcap <= _MAX_SOFTCAP
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
    sinks: Tensor | None,
) -> Tensor | None:
    """Attention by our kernels, or None where they do not serve the mask."""
    seqlen_q, head_dim_v = query.shape[2], value.shape[-1]
    layout, plan = _layout_of(mask, query, key)
    if mask is not None:
        if layout is None:
            return None
        scores = scores._replace(causal=layout.causal, left=layout.left, right=layout.right)
        if layout.tokens is not None and plan is None:
            return None
    seqlen_k: int | Tensor = key.shape[2]
    if layout is None:
        # As torch's attention, which cuts off the slots of a static cache that are empty yet.
        if scores.causal and key.shape[2] < seqlen_q:
            return None
        seqlen_k = seqlen_q if scores.causal else seqlen_k
    elif plan is None and (scores.causal or scores.left >= 0 or scores.right >= 0):
        seqlen_k = layout.start + seqlen_q
        if isinstance(seqlen_k, Tensor):
            if not scores.causal:
                return None
        elif seqlen_k > key.shape[2] or (seqlen_k < key.shape[2] and not scores.causal):
            return None
    if sinks is not None:
        sinks = sinks.to(query.device, torch.float32)
    query, key, value = _same_widths(query, key, value)
    if isinstance(plan, PaddedPlan):
        out = _padded(query, key, value, plan, scores, sinks)
    elif isinstance(plan, SharedPlan):
        free = scores._replace(causal=False, left=-1, right=-1)
        out = _shared(query, key, value, plan, free, sinks)
    elif isinstance(seqlen_k, Tensor):
        lengths = seqlen_k.int().view(1).expand(query.shape[0]).contiguous()
        out = _shared(query, key, value, SharedPlan(None, lengths), scores, sinks)
    else:
        key, value = key[:, :, :seqlen_k], value[:, :, :seqlen_k]
        out = _dense(query, key, value, scores, sinks)
    return out if out.shape[-1] == head_dim_v else out[..., :head_dim_v].contiguous()


def bottom_right(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Attention [batch, seqlen_q, heads, head_dim_v] of whole sequences, ends aligned."""
    out = _dense(*_same_widths(query, key, value), scores, None)
    return out if out.shape[-1] == value.shape[-1] else out[..., : value.shape[-1]].contiguous()


def _layout_of(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[KeyLayout | None, Plan]:
    """What key_mask knew of its mask; a boolean mask that gives each row one set of keys too."""
    layout: KeyLayout | None
    if mask is None:
        return None, None
    batch, seqlen_q, seqlen_k = query.shape[0], query.shape[2], key.shape[2]
    rules = getattr(mask, "key_rules", None)
    if rules is not None and torch.compiler.is_compiling():
        # Dynamo would run a KeyMask's properties once and keep what they give.
        start, causal, left, right = rules
        key_start, tokens = mask.key_start, mask.key_tokens  # type: ignore[attr-defined]
        start = start if key_start is None else key_start
        layout = KeyLayout(
            mask.shape[0], mask.shape[2], mask.shape[3], start, causal, left, right, tokens
        )
        return layout, plan_of_layout(layout, mask.device, True)
    layout = getattr(mask, "key_layout", None)
    if layout is not None:
        if (layout.batch, layout.seqlen_q, layout.seqlen_k) != (batch, seqlen_q, seqlen_k):
            return None, None
        return layout, mask.key_plan  # type: ignore[attr-defined]
    if (
        mask.dtype != torch.bool
        or mask.ndim != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] != 1
        or mask.shape[3] != seqlen_k
        or not (mask.shape[2] == 1 or (mask.shape[2] == seqlen_q and mask.stride(2) == 0))
    ):
        return None, None
    tokens = mask[:, 0, 0].expand(batch, -1)
    layout = KeyLayout(batch, seqlen_q, seqlen_k, 0, False, -1, -1, tokens)
    return layout, plan_of_layout(layout, mask.device, True)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, sinks: Tensor | None
) -> Tensor:
    """No padding: flash_attn, or on the CPU paged_attention where the queries are few."""
    batch, _, seqlen_q, _ = query.shape
    if key.shape[2] == 0:
        return query.new_zeros(query.transpose(1, 2).shape)
    if not query.is_cuda and seqlen_q <= _FEW_QUERIES:
        lengths = torch.full((batch,), key.shape[2], dtype=torch.int32, device=query.device)
        return _shared(query, key, value, SharedPlan(None, lengths), scores, sinks)
    q, k, v = (_last_contiguous(x).transpose(1, 2) for x in (query, key, value))
    return torch.ops.llamatelemetry.flash_attn.default(q, k, v, sinks, None, *scores, None)[0]


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


def _shared(
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


def _padded(
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


def _same_widths(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    return row // slot, [x.as_strided(shape, strides) for x in (key, value)]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _say_once(sentence: str) -> None:
    if not torch.compiler.is_compiling() and sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, stacklevel=3)
