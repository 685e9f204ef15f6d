"""Rotary embedding, the paged cache and the step's own tensors as custom ops."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatelemetry.triton_ops.kernels.cache import (
    append_kernel,
    rope_append_kernel,
    rotary_kernel,
)
from llamatelemetry.triton_ops.kernels.step import advance_kernel
from llamatelemetry.triton_ops.launch import (
    check,
    check_shape,
    dependent,
    next_power_of_2,
    on_device,
)


def _check_tables(
    op: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, head_dim: int
) -> None:
    check(op, "cos", cos, like=x)
    check(op, "sin", sin, like=x)
    check_shape(op, "sin", sin, cos.shape)
    rotary_dim = cos.shape[1]
    if rotary_dim % 2 or rotary_dim > head_dim or cos.stride(0) != sin.stride(0):
        raise RuntimeError(
            f"{op}: cos and sin must be alike and [positions, an even rotary_dim up to {head_dim}],"
            f" got {list(cos.shape)} with strides {cos.stride()} and {sin.stride()}"
        )
    if positions is not None:
        check_shape(op, "positions", positions, x.shape[:1])


def _check_cache(op: str, like: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    check(op, "k_cache", k_cache, like=like)
    check(op, "v_cache", v_cache, like=like)
    check_shape(op, "v_cache", v_cache, k_cache.shape)
    check_shape(op, "slot_mapping", slots, like.shape[:1])
    if k_cache.shape[3] != like.shape[2] or not (
        k_cache.stride(2) == v_cache.stride(2) == like.shape[2]
    ):
        raise RuntimeError(
            f"{op}: k_cache and v_cache must be [num_blocks, page_size, num_heads_kv, "
            f"{like.shape[2]}] with contiguous heads, got {list(k_cache.shape)}"
        )


def _strides(k_cache: Tensor, v_cache: Tensor) -> tuple[int, int, int, int]:
    return k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1)


@torch.library.custom_op("llamatelemetry_triton::rotary_embedding_", mutates_args=("q", "k"))
def rotary_embedding_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> None:
    """``llamatelemetry.ops.rotary_embedding_`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "rotary_embedding_"
    check(op, "q", q)
    check(op, "k", k, like=q)
    _check_tables(op, q, cos, sin, positions, q.shape[2])
    with on_device(q):
        for x in (q, k):
            if x.numel() and cos.shape[1]:
                rotary_kernel[x.shape[:2]](
                    *(x, cos, sin, positions, x.stride(0), x.stride(1), cos.stride(0)),
                    *cos.shape,
                    INTERLEAVED=interleaved,
                    BLOCK=next_power_of_2(cos.shape[1]),
                    num_warps=1,
                )


@torch.library.custom_op("llamatelemetry_triton::append_kv_", mutates_args=("k_cache", "v_cache"))
def append_kv_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """``llamatelemetry.ops.append_kv_`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "append_kv_"
    check(op, "k", k)
    check(op, "v", v, like=k)
    check_shape(op, "v", v, k.shape)
    _check_cache(op, k, k_cache, v_cache, slot_mapping)
    check_shape(op, "k_cache's heads of", k, (k.shape[0], *k_cache.shape[2:]))
    if k.numel() and k_cache.numel():
        with on_device(k):
            append_kernel[k.shape[:2]](
                *(k, v, k_cache, v_cache, slot_mapping),
                *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
                *_strides(k_cache, v_cache),
                *(k_cache.shape[0] * k_cache.shape[1], k_cache.shape[1], k.shape[2]),
                BLOCK=next_power_of_2(k.shape[2]),
                num_warps=1,
            )


@torch.library.custom_op(
    "llamatelemetry_triton::rope_append_kv_", mutates_args=("qkv", "k_cache", "v_cache")
)
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
) -> None:
    """``llamatelemetry.ops.rope_append_kv_`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    op = "rope_append_kv_"
    check(op, "qkv", qkv)
    _check_tables(op, qkv, cos, sin, positions, qkv.shape[2])
    _check_cache(op, qkv, k_cache, v_cache, slot_mapping)
    num_heads_kv = k_cache.shape[2]
    num_heads_q = qkv.shape[1] - 2 * num_heads_kv
    if num_heads_q < 1:
        raise RuntimeError(
            f"{op}: qkv must have heads of q besides twice {num_heads_kv}, got {qkv.shape[1]}"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check(op, name, weight, like=qkv)
            check_shape(op, name, weight, qkv.shape[2:])
    if qkv.numel():
        with on_device(qkv):
            rope_append_kernel[qkv.shape[:2]](
                *(qkv, cos, sin, positions, k_cache, v_cache, slot_mapping, q_weight, k_weight),
                *(qkv.stride(0), qkv.stride(1), cos.stride(0), *_strides(k_cache, v_cache)),
                *(cos.shape[0], cos.shape[1], k_cache.shape[0] * k_cache.shape[1]),
                *(k_cache.shape[1], num_heads_q, num_heads_kv, qkv.shape[2], eps, weight_offset),
                INTERLEAVED=interleaved,
                HAS_OFFSET=weight_offset != 0.0,
                BLOCK=next_power_of_2(qkv.shape[2]),
                num_warps=1,
                **dependent(qkv.device),
            )


_ADVANCED = ("input_ids", "positions", "slot_mapping", "cache_seqlens", "offsets")


@torch.library.custom_op("llamatelemetry_triton::advance_step_", mutates_args=_ADVANCED)
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
    """``llamatelemetry.ops.advance_step_`` in Triton.

    Raises:
        RuntimeError: Naming the argument, the rule and the value.
    """
    tensors = (input_ids, positions, slot_mapping, cache_seqlens, offsets, next_ids, active)
    for name, x in zip((*_ADVANCED, "next_ids", "active"), tensors, strict=True):
        check_shape("advance_step_", name, x, block_table.shape[:1])
    batch, width = block_table.shape
    if batch:
        with on_device(input_ids):
            advance_kernel[(-(-batch // 128),)](
                *(*tensors, block_table, block_table.stride(0), width, page_size, batch),
                BLOCK=128,
                **dependent(input_ids.device),
            )


def slot_mapping(
    positions: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, page_size: int
) -> Tensor:
    """``llamatelemetry.ops.slot_mapping`` in ops of torch: it runs before a step, not in it."""
    tokens = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
    rows = torch.searchsorted(cu_seqlens_q[1:].contiguous(), tokens, right=True)
    columns = positions // page_size
    known = (positions >= 0) & (columns < block_table.shape[1]) & (rows < len(block_table))
    blocks = block_table[rows.where(known, 0), columns.where(known, 0)].long()
    return torch.where(known & (blocks >= 0), blocks * page_size + positions % page_size, -1)
