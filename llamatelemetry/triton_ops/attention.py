"""Attention over packed sequences as custom ops: keys of the same tokens, or in a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llamatelemetry.triton_ops.kernels.attention import (
    attention_kernel,
    combine_attention_kernel,
)
from llamatelemetry.triton_ops.launch import (
    check,
    check_shape,
    dependent,
    descriptor,
    has_tma,
    next_power_of_2,
    num_multiprocessors,
    on_device,
    precision_of,
    shared_bytes_per_program,
)
from llamatelemetry.triton_ops.tuning import AttentionConfig, prefill_fields

_MOST_SPLITS = 64
_KEYS_OF_A_SPLIT = 64  # fewer are not worth a program


def attention_config(
    rows: int, programs: int, most_keys: int, x: Tensor, *, may_split: bool
) -> AttentionConfig:
    """A launch by what is known on the host.

    Args:
        rows: queries of a sequence times heads that share a key head, at most.
        programs: sequences times key heads.
        most_keys: no sequence has more.
        x: the queries, for dtype, width and device.
    """
    wide, tma = x.shape[-1] > 128, False
    if x.dtype == torch.float32:
        block_m, block_n, warps, stages = min(next_power_of_2(rows, 16), 64), 32, 4, 2
    elif rows <= 64:
        block_m, block_n, stages = next_power_of_2(rows, 16), 64, 3
        warps = 2 if rows <= 16 else 4
    elif not may_split and (fields := prefill_fields(x)) is not None:
        return AttentionConfig(**fields)
    elif tma := not wide and has_tma(x.device):
        block_m, block_n, warps, stages = 64, 64, 4, 3
    else:
        block_m, block_n, warps, stages = 128, 64, 8, 2 if wide else 3
    block_d = next_power_of_2(x.shape[-1], least=16)
    room = shared_bytes_per_program(x.device) // x.element_size() // block_d  # rows of a tile
    while block_m + 2 * block_n * stages > room and (block_n > 16 or stages > 1):
        if stages > 2 or block_n == 16:
            stages -= 1
        else:
            block_m, block_n = max(block_m // 2, 16), block_n // 2
    splits, tiles = 1, programs * -(-rows // block_m)
    if may_split:
        wanted = 4 * num_multiprocessors(x.device) // max(tiles, 1)
        splits = min(wanted, _MOST_SPLITS, -(-most_keys // _KEYS_OF_A_SPLIT))
    return AttentionConfig(block_m, block_n, warps, stages, max(splits, 1), tma)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, softcap: float) -> None:
    check(op, "q", q)
    for name, x in (("k", k), ("v", v)):
        check(op, name, x, like=q)
        check_shape(op, name, x, (*k.shape[:-1], q.shape[2]))
    if k.shape[-2] == 0 or q.shape[1] % k.shape[-2]:
        raise RuntimeError(
            f"{op}: the heads of k must divide those of q, got {k.shape[-2]} and {q.shape[1]}"
        )
    if not 0 <= softcap <= 1e4:
        raise RuntimeError(f"{op}: softcap must be 0 (off) to 10000, got {softcap}")
    if sinks is not None:
        check_shape(op, "sinks", sinks, (q.shape[1],))


@torch.library.custom_op("llamatelemetry_triton::flash_attn_varlen", mutates_args=())
def flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """``llamatelemetry.ops.flash_attn_varlen`` of sequences whose keys are of the same tokens.

    Args:
        q: [total, num_heads_q, head_dim], float32, float16 or bfloat16, any token and head strides.
        k, v: [total, num_heads_kv, head_dim], likewise.
        starts: [batch + 1] int32, where each sequence begins, and the end.
        longest: No sequence is longer.
        scale, causal, left, right, softcap, sinks: As there.

    Returns:
        As q, contiguous.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "flash_attn_varlen"
    _check(op, q, k, v, sinks, softcap)
    check_shape(op, "k", k, (q.shape[0], *k.shape[1:]))
    batch, group = starts.shape[0] - 1, q.shape[1] // k.shape[1]
    config = attention_config(
        longest * group, batch * k.shape[1], longest, q, may_split=longest * group <= 64
    )
    scores = (scale, causal, left, right, softcap)
    return run_varlen(q, k, v, starts, longest, scores, sinks, config)


def run_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    scores: tuple[float, bool, int, int, float],
    sinks: Tensor | None,
    config: AttentionConfig,
) -> Tensor:
    """flash_attn_varlen with a config; scores: scale, causal, left, right and softcap."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = (0, k.stride(0), k.stride(1), 0, v.stride(0), v.stride(1))
    _run(q, k, v, sinks, out, starts, None, None, longest, strides, scores, config)
    return out


@torch.library.custom_op("llamatelemetry_triton::paged_attention", mutates_args=())
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """``llamatelemetry.ops.paged_attention`` in Triton; the keys of few queries are split.

    Args:
        q: [total_q, num_heads_q, head_dim], float32, float16 or bfloat16, any token and head
            strides.
        k_cache, v_cache: [num_blocks, page_size, num_heads_kv, head_dim].
        block_table: [batch, max_blocks] int32.
        cache_seqlens: [batch] int32, keys of each sequence.
        starts: [batch + 1] int32, where each sequence's queries begin, and the end.
        longest: No sequence has more queries.
        scale, causal, left, right, softcap, sinks: As there.

    Returns:
        As q, contiguous.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "paged_attention"
    _check(op, q, k_cache, v_cache, sinks, softcap)
    batch, width = block_table.shape
    check_shape(op, "cache_seqlens", cache_seqlens, (batch,))
    check_shape(op, "starts", starts, (batch + 1,))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    page_size, num_heads_kv = k_cache.shape[1:3]
    group = q.shape[1] // num_heads_kv
    config = attention_config(
        longest * group, batch * num_heads_kv, width * page_size, q, may_split=longest <= 16
    )
    strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    scores = (scale, causal, left, right, softcap)
    where = (starts, cache_seqlens, block_table)
    _run(q, k_cache, v_cache, sinks, out, *where, longest, strides, scores, config)
    return out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    starts: Tensor,
    seqlens: Tensor | None,
    table: Tensor | None,
    longest: int,
    strides: tuple[int, ...],
    scores: tuple[float, bool, int, int, float],
    config: AttentionConfig,
) -> None:
    """Launches attention, and what adds up its parts."""
    scale, causal, left, right, softcap = scores
    (total_q, num_heads, head_dim), num_heads_kv = q.shape, k.shape[-2]
    batch, group = starts.shape[0] - 1, num_heads // num_heads_kv
    if not q.numel() or not batch or longest < 1:
        return
    splits, target, lse = config.splits, out, None
    if splits > 1:
        shape = (splits, total_q, num_heads)
        target = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if causal:
        right = 0
    block_d = next_power_of_2(head_dim, least=16)
    is_paged, page_size = table is not None, 1 if table is None else k.shape[1]
    in_one_page = is_paged and page_size % config.block_n == 0
    descriptors: tuple[TensorDescriptor | None, ...] = (None, None)
    if config.tma and (in_one_page or not is_paged) and block_d == head_dim:
        descriptors = _descriptors(k, v, config.block_n)
    with on_device(q):
        grid = (-(-longest * group // config.block_m), batch * num_heads_kv, splits)
        attention_kernel[grid](
            *(q, k, v, *descriptors, sinks, target, lse, starts, seqlens, table),
            *(0 if table is None else table.stride(0), page_size),
            *(total_q, q.stride(0), q.stride(1), *strides, head_dim),
            *(scale, softcap if softcap else 1.0, max(left, 0), max(right, 0)),
            NUM_HEADS_KV=num_heads_kv,
            GROUP=group,
            HAS_LEFT=left >= 0,
            HAS_RIGHT=right >= 0,
            HAS_SOFTCAP=softcap > 0,
            IS_PAGED=is_paged,
            IN_ONE_PAGE=in_one_page,
            SCALES_LATE=scale > 0 and softcap == 0,
            SPLITS=splits,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_d,
            EVEN_D=block_d == head_dim,
            PRECISION=precision_of(q),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **dependent(q.device),
        )
        if lse is not None:
            _add_parts(target, lse, sinks, out, block_d)


def _add_parts(parts: Tensor, lse: Tensor, sinks: Tensor | None, out: Tensor, width: int) -> None:
    """parts: [splits, total_q, num_heads, head_dim]; width: head_dim or the next power of 2."""
    splits, total_q, num_heads = lse.shape
    combine_attention_kernel[(total_q * num_heads,)](
        *(parts, lse, sinks, out, total_q * num_heads, num_heads, out.shape[-1]),
        SPLITS=splits,
        BLOCK_S=next_power_of_2(splits),
        BLOCK_D=width,
        num_warps=4,
        **dependent(out.device),
    )


def _descriptors(
    k: Tensor, v: Tensor, block_n: int
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Of keys and values as rows of heads, tiles of block_n rows of a head; None where they cannot
    be read so, and of both."""
    found = []
    for x in (k, v):
        if x.dim() == 4:
            if x.stride(0) != x.shape[1] * x.stride(1):
                return None, None
            x = x.flatten(0, 1)
        found.append(descriptor(x, (block_n, 1, x.shape[2])))
    return (None, None) if None in found else (found[0], found[1])


@flash_attn_varlen.register_fake
@paged_attention.register_fake
def _as_q(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)
