"""Attention to a prefix that many sequences share, over the ops of attention."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from llamatelemetry.ops.attention import merge_attn_states, paged_attention


def cascade_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    num_shared_blocks: int,
    max_seqlen_q: int,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal ``paged_attention`` of sequences that begin with the same pages, which are read once.

    The queries of all sequences attend the shared pages as those of one, on tensor cores; each
    sequence attends the rest of its keys by itself, and merge_attn_states makes one of the two.
    Results round once more than those of paged_attention. With several launches more it pays for
    tens of sequences over thousands of shared keys, not for a few (benchmarks/bench_attention.py).

    Args:
        q, k_cache, v_cache, cu_seqlens_q, max_seqlen_q, softmax_scale, softcap, sinks: as in
            paged_attention.
        block_table: [batch, max_blocks] int32; the first num_shared_blocks of every row are those
            of row 0, which alone are read.
        cache_seqlens: [batch] int32, keys of each sequence, the shared ones included; each has all
            its queries behind them. That lies on the device, so that nothing can report a shorter
            one: its queries see the whole prefix.
        num_shared_blocks: whole pages, at most max_blocks; 0: none.

    Returns:
        out and lse as those of paged_attention.

    Raises:
        RuntimeError: naming the argument, the rule and the value.

    Source:
        Ye et al. 2024, Cascade Inference; Juravsky et al. 2024, arXiv:2402.05099
    """
    if block_table.ndim != 2:
        raise RuntimeError(
            "cascade_attention: block_table must be [batch, max_blocks], got shape "
            f"{list(block_table.shape)}"
        )
    batch, max_blocks = block_table.shape
    if cu_seqlens_q.shape != (batch + 1,):
        raise RuntimeError(
            f"cascade_attention: cu_seqlens_q must be [batch + 1] = [{batch + 1}], got shape "
            f"{list(cu_seqlens_q.shape)}"
        )
    if not 0 <= num_shared_blocks <= max_blocks:
        raise RuntimeError(
            "cascade_attention: num_shared_blocks must lie in [0, max_blocks] = "
            f"[0, {max_blocks}], got {num_shared_blocks}"
        )
    attend = partial(paged_attention, softmax_scale=softmax_scale, softcap=softcap)
    if num_shared_blocks == 0 or block_table.shape[0] == 0:
        return attend(
            *(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q),
            max_seqlen_q=max_seqlen_q,
            sinks=sinks,
        )
    num_shared = num_shared_blocks * k_cache.shape[1]
    shared = attend(
        *(q, k_cache, v_cache, block_table[:1, :num_shared_blocks]),
        cache_seqlens.new_full((1,), num_shared),
        cu_seqlens_q[:: block_table.shape[0]].contiguous(),
        max_seqlen_q=q.shape[0],
        causal=False,
    )
    own = attend(
        *(q, k_cache, v_cache, block_table[:, num_shared_blocks:]),
        *((cache_seqlens - num_shared).clamp_(min=0), cu_seqlens_q),
        max_seqlen_q=max_seqlen_q,
        sinks=sinks,
    )
    return merge_attn_states(*shared, *own)
