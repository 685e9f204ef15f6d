"""Attention: of whole sequences, dense or packed, and over a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake


def flash_attn(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of whole sequences, accumulated in float32:
    ``softmax(softcap · tanh(q kᵀ · softmax_scale / softcap) - slope · distance) v``.

    Query i of seqlen_q stands at key ``seqlen_k - seqlen_q + i`` (bottom-right alignment); it sees
    keys up to there if causal, and in a window those at most ``window_size`` = (left, right) keys
    away.

    Args:
        q: [batch, seqlen_q, num_heads_q, head_dim], float32, float16 or bfloat16
        k, v: [batch, seqlen_k, num_heads_kv, head_dim], dtype and device of q; num_heads_kv divides
            num_heads_q; head_dim a multiple of 8 up to 256; any strides with contiguous rows
        softmax_scale: default 1 / sqrt(head_dim)
        window_size: -1: unlimited
        softcap: at most 10000; 0: off
        sinks: [num_heads_q] float32 or None: one more score a head, without a value
        alibi_slopes: [num_heads_q] or [batch, num_heads_q] float32 or None
        backend: None chooses the best that serves the call; one of "cpu", "decode", "decode_sm75",
            "simt", "sm75", "sm80", "sm90" that this build has forces it. "decode", which serves
            fewer than 16 queries a sequence on a GPU, divides the keys of the whole batch evenly,
            and "sm90" cuts long keys where there are few queries in all, so the last bits of a row
            may depend on the rest of the batch. "decode_sm75" is "decode" in float16 for compute
            capability 7.5 and later, without caches of 8 bits; None chooses it on 7.5, where no
            GPU has timed it yet

    Returns:
        out as q, contiguous, and lse [batch, num_heads_q, seqlen_q] float32, the natural log of the
        sum of exponentials, the sink's included. A query that sees no key gives 0 and -inf (the
        sink where there is one). Keys that the window hides from every query never matter.

    Raises:
        RuntimeError: naming the argument, the rule and the value, and for a forced backend why it
            cannot serve the call

    Source:
        Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608; ALiBi: Press et al. 2021,
        arXiv:2108.12409; sinks: Xiao et al. 2023, arXiv:2309.17453
    """
    inference_only("flash_attn", q=q, k=k, v=v, sinks=sinks, alibi_slopes=alibi_slopes)
    return torch.ops.llamatelemetry.flash_attn.default(
        q,
        k,
        v,
        sinks,
        alibi_slopes,
        max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale,
        causal,
        window_size[0],
        window_size[1],
        softcap,
        backend,
    )


def flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """flash_attn of packed sequences of any lengths, each over keys of its own.

    Args:
        q: [total_q, num_heads_q, head_dim], the queries of all sequences, one after the other
        k, v: [total_k, num_heads_kv, head_dim], likewise
        cu_seqlens_q, cu_seqlens_k: [batch + 1] int32, where each sequence starts in q and in k, and
            the end; a sequence may be empty. That they rise within q and k the CPU alone checks
        max_seqlen_q, max_seqlen_k: no sequence is longer; they size the launch
        softmax_scale, causal, window_size, softcap, sinks, alibi_slopes, backend: as in flash_attn

    Returns:
        out as q, contiguous, and lse [num_heads_q, total_q] float32. Lengths are read when the
        kernel runs; rows of q past the last sequence are left unwritten.

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        as flash_attn
    """
    inference_only("flash_attn_varlen", q=q, k=k, v=v, sinks=sinks, alibi_slopes=alibi_slopes)
    return torch.ops.llamatelemetry.flash_attn_varlen.default(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        sinks,
        alibi_slopes,
        max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale,
        causal,
        window_size[0],
        window_size[1],
        softcap,
        backend,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    max_seqlen_q: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    backend: str | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    split_size: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """flash_attn of packed queries, each sequence's over its own keys in a paged cache.

    Args:
        q: [total_q, num_heads_q, head_dim], float32, float16 or bfloat16: the queries of all
            sequences, one after the other; any token and head strides
        k_cache, v_cache: [num_blocks, page_size, num_heads_kv, head_dim], dtype and device of q, or
            float8_e4m3fn (without NaN) or int8 with scales, or on the CPU float16 or bfloat16
            beside float32 (all products and sums in float32); any strides with a contiguous last
            dimension; any page_size (on Hopper more than 64 rows of a key head, in chunks of 16 or
            more queries, run on flash_attn's own kernel where it is 8, 16, 32, 64 or a multiple of
            128, or where a sequence has one page). Over 8 bits "decode" serves chunks too, in
            float16; what it does not serve (float32, a head_dim that is no multiple of 16) "simt"
            does. On Hopper sequences of few queries beside chunks have a launch of their own,
            where a table holds 16384 keys, or those of several 4096 in all
        block_table: [batch, max_blocks] int32, the blocks of each sequence in order
        cache_seqlens: [batch] int32, keys of each sequence, its own queries' (appended before)
            included
        cu_seqlens_q: [batch + 1] int32, where each sequence's queries start in q, and the end
        max_seqlen_q: no sequence has more queries; sizes the launch
        softmax_scale, causal, window_size, softcap, sinks, alibi_slopes: as in flash_attn
        backend: as in flash_attn, but for "sm75", which does not serve pages
        num_splits: into how many equal parts the kernels of few queries (up to 15 a sequence on a
            GPU, 16 on the CPU) cut the keys of each sequence, at most; 0: they choose
        split_size: the same kernels cut at its multiples, itself a multiple of 64; 0: they choose.
            With either of the two a row's bits depend on its own sequence alone: on a GPU beside
            longer sequences too, on the CPU among calls of the same max_seqlen_q
        k_scales, v_scales: [num_blocks, page_size, num_heads_kv] float32 of any strides, or [1]: by
            which caches of 8 bits are multiplied, as append_kv_ writes or takes them; positive

    Returns:
        out as q, contiguous, and lse [num_heads_q, total_q] float32, as in flash_attn; rows of q
        past the last sequence are left unwritten. Lengths and tables are read when the kernel runs.
        Table entries and slots past a sequence's end, or that the window hides from all its
        queries, never matter.

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Kwon et al. 2023, arXiv:2309.06180; split keys: Dao et al. 2023 (Flash-Decoding)
    """
    inference_only("paged_attention", q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks)
    return torch.ops.llamatelemetry.paged_attention.default(
        *(q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, max_seqlen_q),
        max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale,
        *(causal, *window_size, softcap, backend, sinks, alibi_slopes, num_splits, split_size),
        *(k_scales, v_scales),
    )


def merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from that over each: ``out = (exp(lse_a) out_a + exp(lse_b)
    out_b) / (exp(lse_a) + exp(lse_b))``, accumulated in float32.

    What flash_attn_varlen and paged_attention return of the same queries over keys apart from each
    other; a sink counts once, so one of the two has it.

    Args:
        out_a, out_b: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16, contiguous
        lse_a, lse_b: [num_heads, num_tokens] float32, the natural log, contiguous; where one is
            -inf its part saw no key, and what stands in its out never matters

    Returns:
        out as out_a and lse as lse_a; 0 and -inf where neither part saw a key.

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Dao et al. 2023, Flash-Decoding; Ye et al. 2025, arXiv:2501.01005
    """
    inference_only("merge_attn_states", out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return torch.ops.llamatelemetry.merge_attn_states.default(out_a, lse_a, out_b, lse_b)


@register_fake("merge_attn_states")
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@register_fake("paged_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    backend: str | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    split_size: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@register_fake("flash_attn")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@register_fake("flash_attn_varlen")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse
