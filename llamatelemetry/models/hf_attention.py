"""Our attention under transformers' names.

Transformers' caches ``[batch, heads, slots, head_dim]`` are paged ones too: a page a row where all
rows' tokens begin at the first slot, else a page a slot, so that the table leaves padding out.
Neither copies. What our kernels do not serve goes to torch's attention, or to the eager attention
of the module's own file where scores are capped, sinks stand or the weights are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from llamatelemetry.models.hf_configs import exchange, views_of
from llamatelemetry.models.hf_fallback import theirs, wants_weights
from llamatelemetry.models.hf_kernels import Scores, attend, serves
from llamatelemetry.models.hf_layout import KeyLayout
from llamatelemetry.models.hf_masks import KeyMask, key_mask, mask_of
from llamatelemetry.models.hf_overrides import OVERRIDES, Overrides

NAME = "llamatelemetry"
_CHOSEN = "_llamatelemetry_chosen"  # attribute of a transformers model: a _Chosen


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
    mask = attention_mask
    if not causal and isinstance(mask, KeyMask) and not mask.is_floating_point():
        # Where torch's attention gets no mask, a module's own is_causal counts, so it does here;
        # a class that takes no sdpa adds its mask, whatever is_causal says.
        attention_mask = None if mask.key_layout.is_plain_causal else mask
    window = -1 if sliding_window is None else sliding_window - 1
    if attention_mask is None:
        scores = Scores(scale, causal and query.shape[2] > 1, window if causal else -1, -1, 0.0)
    else:
        scores = Scores(scale, False, -1, -1, 0.0)
    scores = scores._replace(softcap=softcap or 0.0)
    has_more = kwargs.get("position_bias") is not None or wants_weights(kwargs)
    if not has_more and serves(query, key, value, scores, dropout, s_aux):
        out = attend(query, key, value, attention_mask, scores, s_aux)
        if out is not None:
            return out, None
    kwargs |= {"softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window}
    return theirs(module, query, key, value, attention_mask, scale, dropout, causal, kwargs)


@dataclass
class _Chosen:
    """Who has chosen our attention in a transformers model."""

    views: list[tuple[Any, Any]]  # a config, and the view of it that stands in its place
    users: set[str]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register()  # a process that has loaded a pickle may not know our attention yet


def _configs_of(model: nn.Module) -> list[Any]:
    """Every config of the transformers models in a model, sub-configs last."""
    configs: list[Any] = []
    waiting: list[Any] = [
        m.config for m in model.modules() if hasattr(m, "set_attn_implementation")
    ]
    while waiting:
        config = waiting.pop(0)
        if any(config is known for known in configs):
            continue
        configs.append(config)
        subs = (getattr(config, key, None) for key in config.sub_configs)
        waiting += [sub for sub in subs if sub is not None]
    return configs


def choose_ours(model: nn.Module, user: str) -> list[Any]:
    """Chooses our attention in every transformers model inside; returns their configs.

    The configs are views: another model of the same config keeps its attention.

    Args:
        user: who chooses. What was chosen before the first user came is restored by ``leave`` when
            the last one goes.
    """
    register()
    for root in _roots_of(model):
        chosen = root.__dict__.get(_CHOSEN)
        if chosen is None:
            chosen = _Chosen(views_of(_configs_of(root)), set())
            setattr(root, _CHOSEN, chosen)
            exchange(root, chosen.views)
        chosen.users.add(user)
        try:
            root.set_attn_implementation(NAME)
        except Exception:
            leave(model, user)
            raise
    return _configs_of(model)


def leave(model: nn.Module, user: str) -> None:
    """Undoes a user's choose_ours; where it chose nothing, nothing changes."""
    for root in _roots_of(model):
        chosen: _Chosen | None = root.__dict__.get(_CHOSEN)
        if chosen is None or user not in chosen.users:
            continue
        chosen.users.remove(user)
        if not chosen.users:
            delattr(root, _CHOSEN)
            for config, view in chosen.views:
                # What stands on it, as for a model around this one, goes back to it later.
                view._attn_implementation_internal = config._attn_implementation
            exchange(root, [(view, config) for config, view in chosen.views])


def _roots_of(model: nn.Module) -> list[Any]:
    """The outermost transformers models in a model."""
    roots: list[Any] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if hasattr(module, "set_attn_implementation") and module not in inside:
            roots.append(module)
            inside.update(module.modules())
    return roots


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
    mask = mask_of(layout._replace(causal=causal, left=left, right=right), query.device)
    return scale, dropout, causal, mask
