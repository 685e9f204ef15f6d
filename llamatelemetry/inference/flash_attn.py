"""Attention of a whole model by our kernels.

Transformers' models get our attention and our masks through AttentionInterface; any other module
gets it where it calls scaled_dot_product_attention or nn.MultiheadAttention.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from llamatelemetry.inference.arguments import instance
from llamatelemetry.inference.attention_function import (
    check_numbers,
    flash_attention_forward,
    window_of,
)
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

STATE = "_llamatelemetry_flash_attention"  # attribute of an enabled model: an _Enabled
_Model = TypeVar("_Model", bound=nn.Module)


def check_flash_attention_available() -> bool:
    """Whether an implementation of flash attention serves this machine; ours counts.

    Example:
        >>> check_flash_attention_available()
        True
    """
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

    Example:
        >>> FlashAttentionConfig(window_size=(255, 0)).causal
        True
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
    causal: list[Any]  # transformers configs whose causality is lifted


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

    Example:
        >>> layer = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
        >>> x, layer = torch.randn(1, 128, 64), enable_flash_attention(layer)
        >>> with torch.inference_mode():
        ...     layer(x, x, x, need_weights=False)[0].shape
        torch.Size([1, 128, 64])
    """
    config = FlashAttentionConfig() if config is None else config
    wanted = "a FlashAttentionConfig"
    instance("enable_flash_attention: config", config, FlashAttentionConfig, wanted)
    window = _checked(config)
    instance("enable_flash_attention: model", model, nn.Module, "a module")
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
        from llamatelemetry.models.hf_attention import choose_ours
        from llamatelemetry.models.hf_configs import lift_causality

        configs = choose_ours(model, STATE)
        causal = [] if config.causal else configs
        lift_causality(causal)
    setattr(model, STATE, _Enabled(plain, overridden, bool(interface), causal))
    return model


def disable_flash_attention(model: _Model) -> _Model:
    """Undoes enable_flash_attention; a model where it is not enabled stays as it is.

    Example:
        >>> layer = enable_flash_attention(torch.nn.MultiheadAttention(64, 4))
        >>> type(disable_flash_attention(layer))
        <class 'torch.nn.modules.activation.MultiheadAttention'>
    """
    instance("disable_flash_attention: model", model, nn.Module, "a module")
    state: _Enabled | None = model.__dict__.pop(STATE, None)
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
        from llamatelemetry.models.hf_configs import restore_causality

        restore_causality(state.causal)
        leave(model, STATE)
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
    check_numbers(op, config.dropout_p, config.softmax_scale)
    if config.enabled and config.version == 3:
        from llamatelemetry.ops.backends import flash_why_not

        on_gpu = torch.cuda.is_available()
        reason = flash_why_not("sm90", torch.float16) if on_gpu else "there is no GPU"
        if reason is not None:
            raise ValueError(
                f"{op}: version must be 2 on this machine, got 3; Hopper's kernels do not serve: "
                f"{reason}"
            )
    return window_of(op, config.window_size)
