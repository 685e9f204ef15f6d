"""Our attention under transformers' names.

Transformers' caches ``[batch, heads, slots, head_dim]`` are paged ones too: a page a row where all
rows' tokens begin at the first slot, else a page a slot, so that the table leaves padding out.
Neither copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llamatelemetry._native.facts import LIMITS
from llamatelemetry.models.hf_masks import PaddedLayout, dense_mask, key_mask, padded_layout
from llamatelemetry.ops import _contract  # noqa: F401  (loads the library)

NAME = "llamatelemetry"
_paged_attention = torch.ops.llamatelemetry.paged_attention.default
_flash_attn = torch.ops.llamatelemetry.flash_attn.default
# Up to so many queries paged_attention's split over the keys serves the CPU better.
_FEW_QUERIES: int = LIMITS["max_split_queries"]


def register() -> None:
    """Makes "llamatelemetry" an attention implementation of transformers, masks included."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``softmax(q kᵀ * scaling) v`` by flash_attn where no mask
    hides a key (and on the CPU the queries are many), else by paged_attention.

    query:     [batch, num_heads_q, seqlen_q, head_dim]
    key, value: [batch, num_heads_kv, seqlen_k, head_dim], any strides
    attention_mask: key_mask's, or anything that scaled_dot_product_attention takes
    Returns:   [batch, seqlen_q, num_heads_q, head_dim]; None
    Torch's attention serves where ours cannot: gradients, dropout, foreign masks, position biases,
    windows over padding.
    """
    softmax_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ours = attention_mask is None or attention_mask.dtype in (torch.uint8, torch.int32)
    layout = None
    if ours and attention_mask is not None and attention_mask.dtype == torch.uint8:
        layout = getattr(attention_mask, "padded_layout", None)
        if layout is None:
            layout = padded_layout(attention_mask, query.shape[0], query.shape[2])
    extras = [name for name in ("position_bias", "s_aux") if kwargs.get(name) is not None]
    if (
        not ours
        or torch.is_grad_enabled()
        or dropout
        or extras
        or (layout is not None and not _serves(layout, sliding_window))
        or query.shape[-1] % 8
        or query.shape[-1] > 256
    ):
        if softcap or "s_aux" in extras:
            raise ValueError(
                f"{NAME} attention: softcap and sinks must be off where gradients, dropout or a "
                'mask of another kind are asked for; use attn_implementation="eager"'
            )
        if ours and causal:
            attention_mask = dense_mask(
                attention_mask, query.shape[2], key.shape[2], sliding_window, key.device
            )
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=softmax_scale,
            is_causal=causal,
            **kwargs,
        )
    options = (
        softmax_scale,
        causal,
        -1 if sliding_window is None else sliding_window - 1,
        -1,
        softcap or 0.0,
    )
    if attention_mask is None and (query.is_cuda or query.shape[2] > _FEW_QUERIES):
        q, k, v = (
            x.transpose(1, 2) for x in (query, _last_contiguous(key), _last_contiguous(value))
        )
        out, _ = _flash_attn(q, k, v, None, None, *options, None)
        return out, None
    if layout is None:
        return _rows_from_first_slot(query, key, value, attention_mask, options), None
    return _rows_with_padding(query, key, value, layout, options), None


def _rows_from_first_slot(
    query: Tensor, key: Tensor, value: Tensor, num_tokens: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    """Attention where every row of the cache is one page, tokens first."""
    batch, num_heads, seqlen_q, head_dim = query.shape
    rows = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    if num_tokens is None:
        lengths = rows.new_full((batch,), key.shape[2])
    else:
        lengths = num_tokens.view(1).expand(batch).contiguous()
    out, _ = _paged_attention(
        query.transpose(1, 2).reshape(-1, num_heads, head_dim),
        _last_contiguous(key).transpose(1, 2),
        _last_contiguous(value).transpose(1, 2),
        rows[:batch, None],
        lengths,
        rows * seqlen_q,
        seqlen_q,
        *options,
    )
    return out.view(batch, seqlen_q, num_heads, head_dim)


def _serves(layout: PaddedLayout, window: int | None) -> bool:
    """Whether _rows_with_padding can: a window counts positions, and padding has none."""
    return not layout.uneven and (window is None or not (layout.has_gap or layout.pads_see))


def _rows_with_padding(
    query: Tensor, key: Tensor, value: Tensor, layout: PaddedLayout, options: tuple[Any, ...]
) -> Tensor:
    """Attention where every slot of the cache is a page, so that the table can leave any out."""
    batch, num_heads, seqlen_q, head_dim = query.shape
    pages_per_row, cache = _slots_as_pages(key, value)
    first_pages = torch.arange(batch, device=query.device).mul_(pages_per_row).unsqueeze(1)
    table = (layout.slots + first_pages).int()
    q = query.transpose(1, 2).reshape(-1, num_heads, head_dim)[layout.order]
    tokens, pads = q[: layout.num_tokens], q[layout.num_tokens :]
    scale, causal, *rest = options
    lengths = (layout.cache_seqlens, layout.cu_seqlens_q, seqlen_q)
    out, _ = _paged_attention(tokens, *cache, table, *lengths, scale, causal, *rest)
    if layout.pads_see:
        lengths = (layout.pad_seqlens, layout.cu_pads, seqlen_q)
        pads_out, _ = _paged_attention(pads, *cache, table, *lengths, scale, False, *rest)
    else:
        pads_out = torch.zeros_like(pads)
    return torch.cat([out, pads_out])[layout.places].view(batch, seqlen_q, num_heads, head_dim)


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
