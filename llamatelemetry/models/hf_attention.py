"""Our attention under transformers' names.

Transformers' caches ``[batch, heads, slots, head_dim]`` are paged ones too: a page a row where all
rows' tokens begin at the first slot, else a page a slot, so that the table leaves padding out.
Neither copies. What our kernels do not serve goes to torch's attention, or to the eager attention
of the module's own file where scores are capped, sinks stand or the weights are asked for.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from llamatelemetry._native import kernels
from llamatelemetry.models.hf_fallback import theirs, wants_weights
from llamatelemetry.models.hf_kernels import Scores, dense, padded, same_widths, shared
from llamatelemetry.models.hf_layout import KeyLayout
from llamatelemetry.models.hf_masks import KeyMask, key_mask
from llamatelemetry.models.hf_plans import PaddedPlan, Plan, SharedPlan, plan_of_layout

NAME = "llamatelemetry"
OVERRIDES = "_llamatelemetry_overrides"  # attribute of a module: an Overrides
MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_SOFTCAP = 10000.0
_said: set[str] = set()


class Overrides(NamedTuple):
    """What enable_flash_attention's configuration changes in a module's attention."""

    softmax_scale: float | None = None
    dropout_p: float = 0.0
    window: tuple[int, int] = (-1, -1)
    causal: bool = True


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
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: ``softmax(q kᵀ * scaling) v``.

    A mask says all of causality and windows, as with eager attention; is_causal and
    sliding_window count where there is none.

    Args:
        query: [batch, num_heads_q, seqlen_q, head_dim]
        key: [batch, num_heads_kv, seqlen_k, head_dim], any strides
        value: [batch, num_heads_kv, seqlen_k, head_dim_v], any strides
        attention_mask: key_mask's, or what scaled_dot_product_attention takes
        s_aux: [num_heads_q], one more score a head, without a value

    Returns:
        [batch, seqlen_q, num_heads_q, head_dim_v], contiguous, and the weights or None. Gradients,
        dropout, additive masks and position biases go to torch's attention.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    overrides = module.__dict__.get(OVERRIDES)
    if overrides is not None:
        scale, dropout, causal, attention_mask = _overridden(
            overrides, module, query, key, attention_mask, scale, dropout, causal, sliding_window
        )
    window = -1 if sliding_window is None else sliding_window - 1
    if attention_mask is None:
        scores = Scores(scale, causal and query.shape[2] > 1, window if causal else -1, -1, 0.0)
    else:
        scores = Scores(scale, False, -1, -1, 0.0)
    scores = scores._replace(softcap=softcap or 0.0)
    if _serves(query, key, value, scores, dropout, s_aux, kwargs):
        out = _ours(query, key, value, attention_mask, scores, s_aux)
        if out is not None:
            return out, None
    kwargs |= {"softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window}
    return theirs(module, query, key, value, attention_mask, scale, dropout, causal, kwargs)


def _serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    dropout: float,
    sinks: Tensor | None,
    kwargs: dict[str, Any],
) -> bool:
    """Whether our kernels can, the mask aside."""
    width = max(query.shape[-1], value.shape[-1])
    if width > MAX_HEAD_DIM:
        _say_once(
            f"{NAME} attention: head_dim must be at most {MAX_HEAD_DIM}, got {width}; torch's own "
            "attention serves these layers"
        )
        return False
    tensors = [x for x in (query, key, value, sinks) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    kind = query.device.type
    return (
        not dropout
        and kwargs.get("position_bias") is None
        and not wants_weights(kwargs)
        and (kind == "cpu" or (kind == "cuda" and "flash_attn" not in kernels.without_cuda))
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and key.shape[:3] == value.shape[:3]
        and 0.0 <= scores.softcap <= _MAX_SOFTCAP
    )


def _ours(
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
    query, key, value = same_widths(query, key, value)
    if isinstance(plan, PaddedPlan):
        out = padded(query, key, value, plan, scores, sinks)
    elif isinstance(plan, SharedPlan):
        free = scores._replace(causal=False, left=-1, right=-1)
        out = shared(query, key, value, plan, free, sinks)
    elif isinstance(seqlen_k, Tensor):
        lengths = seqlen_k.int().view(1).expand(query.shape[0]).contiguous()
        out = shared(query, key, value, SharedPlan(None, lengths), scores, sinks)
    else:
        key, value = key[:, :, :seqlen_k], value[:, :, :seqlen_k]
        out = dense(query, key, value, scores, sinks)
    return out if out.shape[-1] == head_dim_v else out[..., :head_dim_v].contiguous()


def _layout_of(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[KeyLayout | None, Plan]:
    """What key_mask knew of its mask; a boolean mask that gives each row one set of keys too."""
    if mask is None:
        return None, None
    batch, seqlen_q, seqlen_k = query.shape[0], query.shape[2], key.shape[2]
    layout: KeyLayout | None = getattr(mask, "key_layout", None)
    if layout is not None:
        if (layout.batch, layout.seqlen_q, layout.seqlen_k) != (batch, seqlen_q, seqlen_k):
            return None, None
        if isinstance(mask, KeyMask) and torch.compiler.is_compiling():
            return layout, plan_of_layout(layout, mask.device, True)
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


def _overridden(
    overrides: Overrides,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    causal: bool,
    sliding_window: int | None,
) -> tuple[float, float, bool, Tensor | None]:
    """Scale, dropout, causality and mask as a configuration changes them."""
    if overrides.softmax_scale is not None:
        scale = overrides.softmax_scale
    if overrides.dropout_p and module.training:
        dropout = overrides.dropout_p
    if overrides.causal and overrides.window == (-1, -1):
        return scale, dropout, causal, mask
    batch, seqlen_q, seqlen_k = query.shape[0], query.shape[2], key.shape[2]
    layout: KeyLayout | None = getattr(mask, "key_layout", None)
    if mask is None:
        # Without a mask causal queries stand at the first slots, as torch's attention has them.
        start = 0 if causal and seqlen_q > 1 else seqlen_k - seqlen_q
        left = sliding_window - 1 if sliding_window is not None and causal else -1
        layout = KeyLayout(batch, seqlen_q, seqlen_k, start, causal, left, -1, None)
    if layout is None:
        raise ValueError(
            f"{NAME} attention: causal and window_size of the configuration must be left alone for "
            f"a model that makes masks of its own, got them for {type(module).__name__}"
        )
    left, right = (
        b if a < 0 else a if b < 0 else min(a, b)
        for a, b in zip(layout[5:7], overrides.window, strict=True)
    )
    causal = layout.causal and overrides.causal
    return (
        scale,
        dropout,
        causal,
        KeyMask(layout._replace(causal=causal, left=left, right=right), query.device),
    )


def _say_once(sentence: str) -> None:
    if not torch.compiler.is_compiling() and sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, stacklevel=3)
