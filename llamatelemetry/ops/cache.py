"""The paged cache: slots of tokens, keys and values written to them, whole blocks copied."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.ops._contract import inference_only, register_fake


def append_kv_(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Writes each token's keys and values to its slot: ``cache[slot // page, slot % page] = k[t]``.

    On the CPU a cache of 16 bits takes float32, rounded to nearest even; what is beyond float16's
    range (from 65520 on) becomes infinite.

    A cache of 8 bits gets ``round(x / scale)``. Where each token and head has a scale, it is set to
    ``max |x|`` over 448 (float8_e4m3fn) or 127 (int8), and to NaN where x holds NaN or inf. One
    scale for the whole tensor is read, and what is larger than the type holds becomes its largest.

    Args:
        k, v: [num_tokens, num_heads_kv, head_dim], float32, float16 or bfloat16; any token and head
            strides (slices of a merged qkv), last dimension contiguous
        k_cache, v_cache: [num_blocks, page_size, num_heads_kv, head_dim], dtype and device of k, or
            float8_e4m3fn or int8 (head_dim up to 256), or on the CPU float16 or bfloat16 beside
            float32; written in place; memory of their own; any
            page_size, any block and slot strides, heads contiguous
        slot_mapping: [num_tokens] int64, block * page_size + offset; -1 skips the token. Slots of
            one call must differ. Any other value outside the cache is a mistake that nothing can
            report, for it lies on the device: such a token is skipped too
        k_scales, v_scales: [num_blocks, page_size, num_heads_kv] float32 of any strides, written in
            place, or [1], read; None but beside caches of 8 bits

    Raises:
        RuntimeError: naming the argument, the rule and the value
    """
    inference_only("append_kv_", k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    caches = (k_cache, v_cache, slot_mapping, k_scales, v_scales)
    torch.ops.llamatelemetry.append_kv_.default(k, v, *caches)


@register_fake("append_kv_")
def _(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    return None


def rope_append_kv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """``rms_norm`` of each head, ``rotary_embedding_`` and ``append_kv_`` of packed q, k and v, one
    launch.

    Rounds where the three ops would.

    Args:
        qkv: [num_tokens, num_heads_q + 2 * num_heads_kv, head_dim], float32, float16 or bfloat16,
            the heads of q, of k and of v; q and k are written in place; any token and head strides,
            last dimension contiguous; head_dim up to 256
        cos, sin, positions, interleaved: as in rotary_embedding_; a rotary_dim of 0 turns nothing
        k_cache, v_cache, slot_mapping, k_scales, v_scales: as in append_kv_; dtype of qkv, 8 bits,
            or on the CPU 16 bits beside float32
        q_weight, k_weight: [head_dim], dtype of qkv: of the norm of each head of q and of k; None:
            there is none
        eps, weight_offset: of both norms, as in rms_norm

    Raises:
        RuntimeError: naming the argument, the rule and the value

    Source:
        Zhang & Sennrich 2019, arXiv:1910.07467; Su et al. 2021, arXiv:2104.09864
    """
    inference_only("rope_append_kv_", qkv=qkv, k_cache=k_cache, v_cache=v_cache, q_weight=q_weight)
    torch.ops.llamatelemetry.rope_append_kv_.default(
        *(qkv, cos, sin, positions, interleaved, k_cache, v_cache, slot_mapping),
        *(q_weight, k_weight, eps, weight_offset, k_scales, v_scales),
    )


@register_fake("rope_append_kv_")
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    return None


def copy_blocks_(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> None:
    """Copies whole blocks within a cache: ``cache[dst] = cache[src]`` for each pair, K and V.

    Scales of a cache of 8 bits are a cache of head_dim 1: ``scales.unsqueeze(-1)``.

    Args:
        k_cache, v_cache: [num_blocks, page_size, num_heads_kv, head_dim], float32, float16,
            bfloat16, float8_e4m3fn or int8, written in place; memory of their own; any page_size,
            any block and slot strides, heads contiguous
        block_pairs: [num_pairs, 2] int64, (src, dst). All pairs run at once: no dst may be another
            pair's src or dst. A pair outside the cache is skipped, so (-1, -1) pads

    Raises:
        RuntimeError: naming the argument, the rule and the value
    """
    inference_only("copy_blocks_", k_cache=k_cache, v_cache=v_cache)
    torch.ops.llamatelemetry.copy_blocks_.default(k_cache, v_cache, block_pairs)


@register_fake("copy_blocks_")
def _(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> None:
    return None


def swap_blocks_(
    k_from: Tensor, v_from: Tensor, k_to: Tensor, v_to: Tensor, block_pairs: Tensor
) -> None:
    """Copies whole blocks between caches: ``to[dst] = from[src]`` for each pair, K and V.

    One launch on the current stream, however many blocks, where one cache is a GPU's and the other
    pinned host memory, either way. On a stream of its own it runs beside a step:

    >>> with torch.cuda.stream(side):  # doctest: +SKIP
    ...     side.wait_event(written)
    ...     swap_blocks_(k_cache, v_cache, k_host, v_host, pairs)
    ...     swapped.record()

    The blocks may be written anew once the computing stream has waited for ``swapped``. Keep the
    host's tensors until then: torch does not know that the launch uses them.

    Args:
        k_from, v_from: [num_blocks, page_size, num_heads_kv, head_dim] of a type that copy_blocks_
            takes; any block and slot strides, heads contiguous
        k_to, v_to: likewise, of any number of blocks, written in place; memory apart from each
            other's, k_from's and v_from's. Both pairs on one device, or one of them on the host and
            pinned
        block_pairs: [num_pairs, 2] int64, (src, dst), on the GPU where a cache is on one. All pairs
            run at once: no dst may appear twice. A pair outside the caches is skipped, so (-1, -1)
            pads

    Raises:
        RuntimeError: naming the argument, the rule and the value
    """
    inference_only("swap_blocks_", k_from=k_from, v_from=v_from, k_to=k_to, v_to=v_to)
    torch.ops.llamatelemetry.swap_blocks_.default(k_from, v_from, k_to, v_to, block_pairs)


@register_fake("swap_blocks_")
def _(k_from: Tensor, v_from: Tensor, k_to: Tensor, v_to: Tensor, block_pairs: Tensor) -> None:
    return None


def slot_mapping(
    positions: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, page_size: int
) -> Tensor:
    """Slots of packed tokens: ``table[row, position // page] * page + position % page``.

    Args:
        positions: [num_tokens] int64, of each token within its sequence.
        block_table: [batch, max_blocks] int32, any row stride; a negative block is none.
        cu_seqlens_q: [batch + 1] int32, where the tokens of each sequence begin.
        page_size: tokens in a block, at least 1.

    Returns:
        [num_tokens] int64, what append_kv_ takes; -1 for a position that the table holds no block
        for, and for tokens outside every sequence (padding).

    Raises:
        RuntimeError: names the argument, the rule and the value.
    """
    return torch.ops.llamatelemetry.slot_mapping.default(
        positions, block_table, cu_seqlens_q, page_size
    )


@register_fake("slot_mapping")
def _(positions: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, page_size: int) -> Tensor:
    return positions.new_empty(positions.shape)


def advance_step_(
    input_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache_seqlens: Tensor,
    offsets: Tensor,
    next_ids: Tensor,
    active: Tensor,
    block_table: Tensor,
    page_size: int,
) -> None:
    """Turns the inputs of a decode step into those of the next, without the host: one launch.

    An active row takes its next token; its position, length and offset grow by one, and its slot is
    that of the new position. A row that is not active, or has no block for the new position, stays,
    and its slot becomes -1, so that the next step writes nothing for it: its blocks may belong to
    another sequence by then.

    Args:
        input_ids: [batch] int64, written in place, as all up to offsets.
        positions: [batch] int64, of input_ids.
        slot_mapping: [batch] int64, what append_kv_ takes; -1 where the table has no block.
        cache_seqlens: [batch] int32, keys of each row, that of input_ids included.
        offsets: [batch] int64, how many tokens were drawn, which sample takes.
        next_ids: [batch] int64, what this step has drawn.
        active: [batch] bool.
        block_table: [batch, max_blocks] int32, any row stride; a negative block is none.
        page_size: tokens in a block, at least 1.

    Raises:
        RuntimeError: names the argument, the rule and the value.
    """
    torch.ops.llamatelemetry.advance_step_.default(
        input_ids,
        positions,
        slot_mapping,
        cache_seqlens,
        offsets,
        next_ids,
        active,
        block_table,
        page_size,
    )


@register_fake("advance_step_")
def _(
    input_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache_seqlens: Tensor,
    offsets: Tensor,
    next_ids: Tensor,
    active: Tensor,
    block_table: Tensor,
    page_size: int,
) -> None:
    return None
