"""Rotary embedding and writes to the paged cache: a program a token and a head."""

# mypy: ignore-errors
# (the bodies are Triton's language, and only look like Python)

from __future__ import annotations

import triton
import triton.language as tl

from llamatelemetry.triton_ops.kernels.dependent import begin
from llamatelemetry.triton_ops.kernels.norm import weighted


@triton.jit
def rotated_columns(lanes, rotary_dim, INTERLEAVED: tl.constexpr):
    """The column that each is turned with, and the sign that column's value has."""
    if INTERLEAVED:
        other, is_first = lanes ^ 1, lanes % 2 == 0
    else:
        half = rotary_dim // 2
        is_first = lanes < half
        other = tl.where(is_first, lanes + half, lanes - half)
    turns = lanes < rotary_dim
    return tl.where(turns, other, lanes), tl.where(is_first, -1.0, 1.0), turns


@triton.jit
def turned(
    x, partner, sign, turns, cos_ptr, sin_ptr, lanes, position, num_positions, rotary_dim, stride
):
    """x * cos + rotate_half(x) * sin, each product rounded; NaN for positions without a row."""
    # A scalar chooses how far the mask goes: the interpreter knows no mask made of one.
    is_known = (position >= 0) & (position < num_positions)
    known = lanes < tl.where(is_known, rotary_dim, 0)
    row = tl.where(is_known, position, 0) * stride + lanes
    cos = tl.load(cos_ptr + row, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + row, mask=known, other=float("nan")).to(tl.float32)
    direct = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    across = (partner.to(tl.float32) * sign * sin).to(x.dtype).to(tl.float32)
    return tl.where(turns, (direct + across).to(x.dtype), x)


@triton.jit
def rotary_kernel(
    x_ptr,  # [num_tokens, heads, head_dim], written in place
    cos_ptr,  # [num_positions, rotary_dim]
    sin_ptr,
    positions_ptr,  # [num_tokens] or None
    token_stride,
    head_stride,
    cos_stride,
    num_positions,
    rotary_dim,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * token_stride + tl.program_id(1) * head_stride
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    other, sign, turns = rotated_columns(lanes, rotary_dim, INTERLEAVED)
    x = tl.load(x_ptr + lanes, mask=turns, other=0.0)
    partner = tl.load(x_ptr + other, mask=turns, other=0.0)
    tl.debug_barrier()  # a thread reads what another one writes
    out = turned(
        x, partner, sign, turns, cos_ptr, sin_ptr, lanes, position, num_positions, rotary_dim,
        cos_stride,
    )  # fmt: skip
    tl.store(x_ptr + lanes, out, mask=turns)


@triton.jit
def append_kernel(
    k_ptr,  # [num_tokens, num_heads_kv, head_dim]
    v_ptr,
    k_cache_ptr,  # [num_blocks, page_size, num_heads_kv, head_dim]
    v_cache_ptr,
    slots_ptr,  # [num_tokens] int64
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    num_slots,
    page_size,
    head_dim,
    BLOCK: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < tl.where((slot >= 0) & (slot < num_slots), head_dim, 0)
    block, row = slot // page_size, slot % page_size
    k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + lanes, mask=mask)
    v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + lanes, mask=mask)
    k_where = block * k_block_stride + row * k_slot_stride + head * head_dim + lanes
    v_where = block * v_block_stride + row * v_slot_stride + head * head_dim + lanes
    tl.store(k_cache_ptr + k_where, k, mask=mask)
    tl.store(v_cache_ptr + v_where, v, mask=mask)


@triton.jit
def rope_append_kernel(
    qkv_ptr,  # [num_tokens, num_heads_q + 2 * num_heads_kv, head_dim]; q and k written in place
    cos_ptr,  # [num_positions, rotary_dim]
    sin_ptr,
    positions_ptr,  # [num_tokens] or None
    k_cache_ptr,  # [num_blocks, page_size, num_heads_kv, head_dim]
    v_cache_ptr,
    slots_ptr,  # [num_tokens] int64
    q_weight_ptr,  # [head_dim] or None
    k_weight_ptr,
    token_stride,
    head_stride,
    cos_stride,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    num_positions,
    rotary_dim,
    num_slots,
    page_size,
    num_heads_q,
    num_heads_kv,
    head_dim,
    eps,
    weight_offset,
    INTERLEAVED: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    begin(IS_DEPENDENT)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    qkv_ptr += token * token_stride + head * head_stride
    lanes = tl.arange(0, BLOCK)
    inside = lanes < head_dim
    x = tl.load(qkv_ptr + lanes, mask=inside, other=0.0)
    slot = tl.load(slots_ptr + token)
    kept = lanes < tl.where((slot >= 0) & (slot < num_slots), head_dim, 0)
    block, row = slot // page_size, slot % page_size
    if head >= num_heads_q + num_heads_kv:
        head_kv = head - num_heads_q - num_heads_kv
        where = block * v_block_stride + row * v_slot_stride + head_kv * head_dim + lanes
        tl.store(v_cache_ptr + where, x, mask=kept)
    else:
        other, sign, turns = rotated_columns(lanes, rotary_dim, INTERLEAVED)
        partner = tl.load(qkv_ptr + other, mask=inside, other=0.0)
        tl.debug_barrier()  # a thread reads what another one writes
        bits = x.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(bits * bits, axis=0) / head_dim + eps)
        if q_weight_ptr is not None:  # noqa: SIM102  (is compiled away where None)
            if head < num_heads_q:
                w = tl.load(q_weight_ptr + lanes, mask=inside, other=0.0)
                w_other = tl.load(q_weight_ptr + other, mask=inside, other=0.0)
                x = weighted(bits, scale, w, weight_offset, HAS_OFFSET, x.dtype)
                partner = weighted(
                    partner.to(tl.float32), scale, w_other, weight_offset, HAS_OFFSET, x.dtype
                )
        if k_weight_ptr is not None:  # noqa: SIM102
            if head >= num_heads_q:
                w = tl.load(k_weight_ptr + lanes, mask=inside, other=0.0)
                w_other = tl.load(k_weight_ptr + other, mask=inside, other=0.0)
                x = weighted(bits, scale, w, weight_offset, HAS_OFFSET, x.dtype)
                partner = weighted(
                    partner.to(tl.float32), scale, w_other, weight_offset, HAS_OFFSET, x.dtype
                )
        position = token
        if positions_ptr is not None:
            position = tl.load(positions_ptr + token).to(tl.int64)
        out = turned(
            x, partner, sign, turns, cos_ptr, sin_ptr, lanes, position, num_positions,
            rotary_dim, cos_stride,
        )  # fmt: skip
        tl.store(qkv_ptr + lanes, out, mask=inside)
        if head >= num_heads_q:
            head_kv = head - num_heads_q
            where = block * k_block_stride + row * k_slot_stride + head_kv * head_dim + lanes
            tl.store(k_cache_ptr + where, out, mask=kept)
