"""Flash attention as one function of queries, keys and values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = True,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    window_size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Attention ``softmax(q kᵀ · softmax_scale) v`` of whole sequences, in one pass over the keys.

    Query i of seqlen_q stands at key ``seqlen_k - seqlen_q + i`` (bottom-right alignment). With
    gradients, dropout, float64 or head_dim above 256 torch's differentiable attention computes it.

    Args:
        query: [batch, seqlen_q, num_heads_q, head_dim], float32, float16, bfloat16 or float64.
        key: [batch, seqlen_k, num_heads_kv, head_dim]; num_heads_kv divides num_heads_q.
        value: [batch, seqlen_k, num_heads_kv, head_dim_v].
        causal: A query sees no key after its own.
        dropout_p: Which share of the weights is dropped; whoever calls it sets 0 in evaluation.
        softmax_scale: None: 1 / sqrt(head_dim).
        window_size: How many keys before and after its own a query sees at most: one number, or
            (left, right); None and -1: all, 0: its own alone.

    Returns:
        [batch, seqlen_q, num_heads_q, head_dim_v], contiguous; 0 where a query sees no key.

    Raises:
        ValueError: Naming the argument, the rule and the value.

    Source:
        Dao 2023, arXiv:2307.08691.

    Example:
        >>> q = torch.randn(1, 16, 8, 64)
        >>> k = v = torch.randn(1, 32, 2, 64)  # a cache: more keys, fewer heads
        >>> flash_attention_forward(q, k, v).shape
        torch.Size([1, 16, 8, 64])
    """
    from llamatelemetry.models.hf_kernels import Scores, bottom_right, serves
    from llamatelemetry.models.hf_layout import KeyLayout

    left, right = window_of("flash_attention_forward", window_size)
    check_numbers("flash_attention_forward", dropout_p, softmax_scale)
    _check_tensors(query, key, value)
    scale = max(query.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = Scores(scale, causal, left, right, 0.0)
    if serves(q, k, v, scores, dropout_p):
        return bottom_right(q, k, v, scores)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    layout = KeyLayout(1, seqlen_q, seqlen_k, seqlen_k - seqlen_q, causal, left, right, None)
    mask = layout.dense(query.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=True
    )
    sees = mask.any(-1, keepdim=True)
    return torch.where(sees, out, 0.0).transpose(1, 2).contiguous()


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    op = "flash_attention_forward"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(
                f"{op}: {name} must be [batch, seqlen, num_heads, head_dim], got {list(x.shape)}"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{op}: {name} must have query's dtype and device ({query.dtype}, {query.device}), "
                f"got {x.dtype}, {x.device}; cast it with {name}.to(query)"
            )
    if not query.is_floating_point():
        raise ValueError(f"{op}: query must be a floating-point tensor, got {query.dtype}")
    if query.shape[3] == 0:
        raise ValueError(f"{op}: head_dim must be at least 1, got 0")
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{op}: key must have query's batch and head_dim, got {list(key.shape)} for "
            f"{list(query.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{op}: value must be {list(key.shape[:3])} and its head_dim, got {list(value.shape)}"
        )
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{op}: key's heads must divide query's {query.shape[2]}, got {key.shape[2]}"
        )


def check_numbers(op: str, dropout_p: float, softmax_scale: float | None) -> None:
    """Refuses a dropout outside [0, 1) and a scale that is not finite."""
    from llamatelemetry.inference.arguments import real

    if not 0.0 <= real(f"{op}: dropout_p", dropout_p) < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p!r}")
    if softmax_scale is not None and not math.isfinite(real(f"{op}: softmax_scale", softmax_scale)):
        raise ValueError(f"{op}: softmax_scale must be finite, got {softmax_scale!r}")


def window_of(op: str, window_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(left, right) of a window_size, -1 for no limit; refuses what is none."""
    if window_size is None:
        return -1, -1
    pair = window_size if isinstance(window_size, (tuple, list)) else (window_size, window_size)
    whole = [isinstance(x, int) and not isinstance(x, bool) and x >= -1 for x in pair]
    if whole != [True, True]:
        raise ValueError(
            f"{op}: window_size must be None, an int of at least -1 or two of them (left, right), "
            f"got {window_size!r}"
        )
    return pair[0], pair[1]
