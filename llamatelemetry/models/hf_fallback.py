"""The attention that serves where ours does not: torch's, or the module's own eager one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing

from llamatelemetry.models.hf_masks import KeyMask

_OWN_EAGER: dict[type, Any] = {}


def theirs(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Torch's attention; the module's own eager one where that would leave something out."""
    needs_eager = (
        kwargs["softcap"] is not None or kwargs["s_aux"] is not None or wants_weights(kwargs)
    )
    if isinstance(mask, KeyMask) and torch.compiler.is_compiling():
        mask = mask.clone()
    elif isinstance(mask, KeyMask):
        if not needs_eager and mask.key_layout.is_plain_causal:
            mask, causal = None, True  # torch's kernels are fast without a mask
        else:
            mask = mask.dense()
    if not needs_eager:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("softcap", "s_aux")}
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scale,
            is_causal=causal,
            **kwargs,
        )
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    return own_eager(type(module))(
        module, query, key, value, mask, scaling=scale, dropout=dropout, **kwargs
    )


def own_eager(kind: type) -> Any:
    """The eager_attention_forward beside a module's class or a class that it extends."""
    if kind not in _OWN_EAGER:
        files = (sys.modules.get(base.__module__) for base in kind.__mro__)
        found = (getattr(file, "eager_attention_forward", None) for file in files)
        _OWN_EAGER[kind] = next((eager for eager in found if eager is not None), plain_attention)
    return _OWN_EAGER[kind]


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention for a module whose file has none: softcap, additive mask, sinks, dropout."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the attention weights are asked for, by argument or by transformers' recorder."""
    if kwargs.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():
        return False
    recorder = getattr(output_capturing, "_active_collector", None)
    recorded = recorder.get() if recorder is not None else None
    return any(name.endswith("attentions") for name in recorded or ())
