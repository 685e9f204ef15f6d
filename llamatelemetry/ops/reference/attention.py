"""Attention in plain PyTorch: dense, packed and paged."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q, k, v [tokens, heads, head_dim], alibi_slopes [num_heads_q]; returns out as
    q, lse [num_heads_q, seqlen_q]."""
    num_queries, num_keys, group = len(q), len(k), q.shape[1] // max(k.shape[1], 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(num_queries, device=q.device) + num_keys - num_queries
    distance = torch.arange(num_keys, device=q.device) - position[:, None]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * distance.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = (right >= 0) & (distance > right) | (left >= 0) & (-distance > left)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.to(q.dtype)[:, None, None].expand(-1, num_queries, 1)
        lse = torch.cat([scores, sink], -1).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(hidden, 0)
    return torch.einsum("hqk,khd->qhd", weights, v), lse


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, alibi_slopes: Tensor | None = None, **options: object
) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros_like(q), q.new_zeros((q.shape[0], q.shape[2], q.shape[1]))
    for b in range(len(q)):
        slopes = _slopes_of(alibi_slopes, b)
        out[b], lse[b] = attention(q[b], k[b], v[b], alibi_slopes=slopes, **options)  # type: ignore[arg-type]
    return out, lse


def flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros_like(q), q.new_zeros((q.shape[1], q.shape[0]))
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts) - 1):
        rows, keys = slice(*starts[b : b + 2]), slice(*key_starts[b : b + 2])
        slopes = _slopes_of(alibi_slopes, b)
        out[rows], lse[:, rows] = attention(
            q[rows],
            k[keys],
            v[keys],
            alibi_slopes=slopes,
            **options,  # type: ignore[arg-type]
        )
    return out, lse


def _slopes_of(alibi_slopes: Tensor | None, b: int) -> Tensor | None:
    return alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    causal: bool = True,
    alibi_slopes: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    if k_scales is not None and v_scales is not None:
        k_cache, v_cache = (
            cache.to(q.dtype) * scales.to(q.dtype).unsqueeze(-1)
            for cache, scales in ((k_cache, k_scales), (v_cache, v_scales))
        )
    k_cache, v_cache = k_cache.to(q.dtype), v_cache.to(q.dtype)
    out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    starts = cu_seqlens_q.tolist()
    for b, num_keys in enumerate(cache_seqlens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        blocks = block_table[b, : -(-num_keys // k_cache.shape[1])]
        k, v = (cache[blocks].flatten(0, 1)[:num_keys] for cache in (k_cache, v_cache))
        out[rows], lse[:, rows] = attention(
            q[rows],
            k,
            v,
            causal=causal,
            alibi_slopes=_slopes_of(alibi_slopes, b),
            **options,  # type: ignore[arg-type]
        )
    return out, lse


def merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros_like(out_a)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = (part_lse - lse).exp().T.unsqueeze(-1).to(out.dtype)
        out += torch.where(part_lse.T.unsqueeze(-1) > -torch.inf, weight * part, 0)
    return out, lse
