"""Attention of a whole model by our kernels, and the same as one function.

Transformers' models get our attention and our masks through AttentionInterface; any other module
gets it where it calls scaled_dot_product_attention or nn.MultiheadAttention.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamatelemetry.inference.context_length import get_optimal_context_length

__all__ = [
    "FLASH_ATTN_AVAILABLE",
    "FlashAttentionConfig",
    "check_flash_attention_available",
    "disable_flash_attention",
    "enable_flash_attention",
    "flash_attention_forward",
    "get_optimal_context_length",
]

_STATE = "_llamatelemetry_flash_attention"  # attribute of an enabled model: an _Enabled
_Model = TypeVar("_Model", bound=nn.Module)


def check_flash_attention_available() -> bool:
    """Whether an implementation of flash attention serves this machine; ours counts."""
    try:
        from llamatelemetry._native import kernels
    except (ImportError, OSError):
        return False
    return kernels.has_kernel("flash_attn", "CPU")


FLASH_ATTN_AVAILABLE = check_flash_attention_available()


@dataclass
class FlashAttentionConfig:
    """What enable_flash_attention changes.

    Args:
        enabled: False undoes what an earlier call enabled.
        version: 2 takes the best kernels of this machine; 3 insists on Hopper's.
        causal: True leaves causality as the model has it; False lifts it.
        dropout_p: Dropout of the weights in training mode; 0 leaves the model's own.
        softmax_scale: What scores are multiplied by; None leaves the model's own.
        window_size: How many keys before and after its own a query sees at most, as one number or
            (left, right), -1 without a limit; None leaves the model's own windows.
    """

    enabled: bool = True
    version: int = 2
    causal: bool = True
    dropout_p: float = 0.0
    softmax_scale: float | None = None
    window_size: int | tuple[int, int] | None = None


class _Enabled(NamedTuple):
    served: list[nn.Module]  # modules that plain_attention serves
    overridden: list[nn.Module]
    has_interface: bool  # our attention is chosen in transformers models
    causal: list[tuple[Any, bool | None]]  # a transformers config, its is_causal


def enable_flash_attention(model: _Model, config: FlashAttentionConfig | None = None) -> _Model:
    """Puts our attention in the place of a model's own; weights and outputs stay.

    Calls with gradients or dropout, and what our kernels do not serve (additive masks, position
    biases, head_dim above 256), compute what they did before; so do calls of nn.MultiheadAttention
    that ask for the weights, as its default need_weights=True does, and where the config changes
    the attention they are an error. A second call with another config replaces the first;
    ``disable_flash_attention`` undoes it.

    Args:
        model: A transformers model whose attention goes through AttentionInterface, or any module
            that calls F.scaled_dot_product_attention or holds nn.MultiheadAttention.
        config: What else to change; None changes nothing else.

    Returns:
        The model.

    Raises:
        ValueError: No attention is found in the model, or the config asks for what there is not.
    """
    config = config or FlashAttentionConfig()
    window = _checked(config)
    if not config.enabled:
        return disable_flash_attention(model)
    from llamatelemetry.models import plain_attention
    from llamatelemetry.models.hf_overrides import OVERRIDES, Overrides

    kinds = {module: plain_attention.attention_kind(_base_of(module)) for module in model.modules()}
    found = [module for module, kind in kinds.items() if kind is not None]
    interface = [module for module in found if kinds[module] == "interface"]
    plain = [module for module in found if kinds[module] != "interface"]
    if not found:
        raise ValueError(
            f"enable_flash_attention: model must contain attention that can be replaced, got "
            f"{type(model).__name__}; looked for modules that use transformers' AttentionInterface,"
            " nn.MultiheadAttention modules, and modules whose code calls "
            f"scaled_dot_product_attention{_older(model)}"
        )
    disable_flash_attention(model)
    if not interface and _older(model):
        warnings.warn(
            f"enable_flash_attention: {type(model).__name__} does not use transformers' "
            "AttentionInterface; only its calls of scaled_dot_product_attention become ours",
            stacklevel=2,
        )
    for module in plain:
        plain_attention.serve(module)
    overrides = Overrides(config.softmax_scale, config.dropout_p, window, config.causal)
    overridden = found if overrides != Overrides() else []
    for module in overridden:
        setattr(module, OVERRIDES, overrides)
    causal = []
    if interface:
        from llamatelemetry.models.hf_attention import choose_ours, lift_causality

        configs = choose_ours(model, _STATE)
        causal = [] if config.causal else lift_causality(configs)
    setattr(model, _STATE, _Enabled(plain, overridden, bool(interface), causal))
    return model


def disable_flash_attention(model: _Model) -> _Model:
    """Undoes enable_flash_attention; a model where it is not enabled stays as it is."""
    state: _Enabled | None = model.__dict__.pop(_STATE, None)
    if state is None:
        return model
    from llamatelemetry.models import plain_attention
    from llamatelemetry.models.hf_overrides import OVERRIDES

    for module in state.served:
        plain_attention.restore(module)
    for module in state.overridden:
        module.__dict__.pop(OVERRIDES, None)
    if state.has_interface:
        from llamatelemetry.models.hf_attention import leave

        leave(model, _STATE)
    for config, is_causal in state.causal:
        if is_causal is None:
            del config.is_causal
        else:
            config.is_causal = is_causal
    return model


def _base_of(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_llamatelemetry_base", type(module))


def _older(model: nn.Module) -> str:
    """What to say of a transformers model whose attention is written out in its own code."""
    if not any(hasattr(base, "_can_set_attn_implementation") for base in type(model).__mro__):
        return ""
    return "; this transformers class computes attention in code of its own"


def _checked(config: FlashAttentionConfig) -> tuple[int, int]:
    """The window of a config whose every field is sound."""
    op = "enable_flash_attention"
    if config.version not in (2, 3):
        raise ValueError(f"{op}: version must be 2 or 3, got {config.version!r}")
    _check_numbers(op, config.dropout_p, config.softmax_scale)
    if config.enabled and config.version == 3:
        from llamatelemetry.ops.backends import flash_why_not

        on_gpu = torch.cuda.is_available()
        reason = flash_why_not("sm90", torch.float16) if on_gpu else "there is no GPU"
        if reason is not None:
            raise ValueError(
                f"{op}: version must be 2 on this machine, got 3; Hopper's kernels do not serve: "
                f"{reason}"
            )
    return _window_of(op, config.window_size)


def _check_numbers(op: str, dropout_p: float, softmax_scale: float | None) -> None:
    from llamatelemetry.inference.arguments import real

    if not 0.0 <= real(f"{op}: dropout_p", dropout_p) < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p!r}")
    if softmax_scale is not None and not math.isfinite(real(f"{op}: softmax_scale", softmax_scale)):
        raise ValueError(f"{op}: softmax_scale must be finite, got {softmax_scale!r}")


def _window_of(op: str, window_size: int | tuple[int, int] | None) -> tuple[int, int]:
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
    """
    from llamatelemetry.models.hf_kernels import Scores, bottom_right, serves
    from llamatelemetry.models.hf_layout import KeyLayout

    left, right = _window_of("flash_attention_forward", window_size)
    _check_numbers("flash_attention_forward", dropout_p, softmax_scale)
    _check_tensors(query, key, value)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
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
