"""Our attention in modules that call torch's: scaled_dot_product_attention, MultiheadAttention.

A served module has another class, made of its own: copies and pickles of it are served too, and
isinstance holds. Calls of scaled_dot_product_attention are caught by a TorchFunctionMode that is
on while the module's forward runs.
"""

from __future__ import annotations

from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llamatelemetry.models.hf_kernels import Scores, attend, serves
from llamatelemetry.models.hf_layout import KeyLayout
from llamatelemetry.models.hf_overrides import OVERRIDES, Overrides, in_force

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_SDPA = "scaled_dot_product_attention"
# They call MultiheadAttention, but in inference torch's own fused layers instead.
_CALLERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def attention_kind(kind: type[nn.Module]) -> str | None:
    """How modules of a class compute attention, by the names that their code mentions.

    Returns:
        "interface", transformers' AttentionInterface; "multihead"; "sdpa"; or None
    """
    if issubclass(kind, nn.MultiheadAttention):
        return "multihead"
    if kind.__module__.startswith("torch."):
        return "sdpa" if issubclass(kind, _CALLERS) else None
    names = _names_of(kind)  # type: ignore[arg-type]
    return "interface" if _INTERFACE in names else "sdpa" if _SDPA in names else None


@cache
def _names_of(kind: Any) -> frozenset[str]:
    """Every name that the methods of a class mention, and the functions that they call."""
    names: set[str] = set()
    seen: set[object] = set()
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(("torch.", "transformers.modeling_")):
            continue  # what all models share mentions everything
        for function in vars(base).values():
            _gather(getattr(function, "__func__", function), names, seen, 3)
    return frozenset(names)


def _gather(function: Any, names: set[str], seen: set[object], depth: int) -> None:
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, FunctionType) or function in seen or depth == 0:
        return
    seen.add(function)
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
        names |= set(code.co_names)
        for name in code.co_names:
            called = function.__globals__.get(name)
            module = str(getattr(called, "__module__", ""))
            if not module.startswith(("torch.", "transformers.integrations")):
                _gather(called, names, seen, depth - 1)


def serve(module: nn.Module) -> None:
    """Puts our attention in the place of torch's in one module; a second call changes nothing."""
    kind: Any = type(module)
    if not hasattr(kind, "_llamatelemetry_base"):
        module.__class__ = _served(kind)


def restore(module: nn.Module) -> None:
    """Undoes serve."""
    base = getattr(type(module), "_llamatelemetry_base", None)
    if base is not None:
        module.__class__ = base
    module.__dict__.pop(OVERRIDES, None)


@cache
def _served(base: Any) -> Any:
    forward = _multihead_forward if issubclass(base, nn.MultiheadAttention) else _forward

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # The class is made at run time: a pickle names the one it is made of.
        state: Any = base.__reduce_ex__(self, protocol)
        return (_new, (base,), *state[2:])

    methods = {
        "_llamatelemetry_base": base,
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), methods)


def _new(base: Any) -> Any:
    kind = _served(base)
    return kind.__new__(kind)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _Sdpa(self):
        return self._llamatelemetry_base.forward(self, *args, **kwargs)


class _Sdpa(TorchFunctionMode):
    """scaled_dot_product_attention is ours while it is on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return sdpa(self.module, *args, **(kwargs or {}))
        if func is Tensor.unflatten:
            func = torch.unflatten  # Dynamo does not trace the method's super()
        return func(*args, **(kwargs or {}))


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention for one module, by our kernels where they serve the call."""
    overrides: Overrides | None = module.__dict__.get(OVERRIDES)
    if overrides is not None:
        scale = scale if overrides.softmax_scale is None else overrides.softmax_scale
        if module.training and overrides.dropout_p:
            dropout_p = overrides.dropout_p
        attn_mask, is_causal = _restricted(overrides, query, key, attn_mask, is_causal)
    scores = Scores(query.shape[-1] ** -0.5 if scale is None else scale, is_causal, -1, -1, 0.0)
    q, k, v = (_four_dimensions(x) for x in (query, key, value))
    mask = attn_mask
    if mask is not None and mask.ndim < 4:
        mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape) if query.ndim > 3 else None
    if (
        not any(x.is_nested for x in (query, key, value))
        and query.ndim in (3, 4)
        and query.ndim == key.ndim == value.ndim
        and (attn_mask is None or (mask is not None and not is_causal))
        and (enable_gqa or query.shape[-3] == key.shape[-3] or query.ndim == 3)
        and serves(q, k, v, scores, dropout_p)
    ):
        out = attend(q, k, v, mask, scores, None)
        if out is not None:
            out = out.transpose(1, 2)
            return out if query.ndim == 4 else out.squeeze(1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _four_dimensions(x: Tensor) -> Tensor:
    """[batch, seqlen, head_dim] as one head."""
    return x.unsqueeze(1) if x.ndim == 3 else x


def _restricted(
    overrides: Overrides, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor | None, bool]:
    """The mask and causality of a call as the configuration has them."""
    causal = causal and overrides.causal
    if overrides.window == (-1, -1):
        return mask, causal
    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    start = 0 if causal else seqlen_k - seqlen_q  # torch's is_causal counts from the first key
    layout = KeyLayout(1, seqlen_q, seqlen_k, start, causal, *overrides.window, None)
    seen = layout.dense(query.device)[0, 0]
    if mask is None:
        return seen, False
    if mask.dtype == torch.bool:
        return mask & seen, False
    return mask.masked_fill(~seen, float("-inf")), False


def _multihead_forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """MultiheadAttention.forward; its own where the weights are asked for and in rare forms."""
    nested = any(x.is_nested for x in (query, key, value))
    rare = self.bias_k is not None or self.bias_v is not None or self.add_zero_attn
    if need_weights or nested or rare or query.ndim != 3:
        if (changed := in_force(self)) is not None:
            raise ValueError(
                f"MultiheadAttention: need_weights must be False, and the input one dense batch, "
                f"for {changed} to count; pass need_weights=False or disable_flash_attention"
            )
        return self._llamatelemetry_base.forward(
            self,
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
    if is_causal and attn_mask is None:
        raise RuntimeError("MultiheadAttention: attn_mask must be given with is_causal, got None")
    if self.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if self._qkv_same_embed_dim:
        q, k, v = F._in_projection_packed(  # type: ignore[attr-defined]
            query, key, value, self.in_proj_weight, self.in_proj_bias
        )
    else:
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = (
            F.linear(x, weight, bias)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
    seqlen_q, batch, _ = query.shape
    q, k, v = (x.view(x.shape[0], batch, self.num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    if is_causal and key_padding_mask is None:
        mask = None
    else:
        padding = _as_boolean(key_padding_mask)
        mask, is_causal = _kept(attn_mask, padding, batch, self.num_heads), False
    dropout = self.dropout if self.training else 0.0
    out = sdpa(self, q, k, v, mask, dropout, is_causal)
    out = out.permute(2, 0, 1, 3).reshape(seqlen_q, batch, -1)
    out = self.out_proj(out)
    return (out.transpose(0, 1) if self.batch_first else out), None


def _as_boolean(padding: Tensor | None) -> Tensor | None:
    """A padding mask of 0 and -inf, as torch's encoder layers make of boolean ones."""
    if padding is None or padding.dtype == torch.bool or torch.compiler.is_compiling():
        return padding
    if padding.is_cuda and torch.cuda.is_current_stream_capturing():
        return padding
    hidden = padding == float("-inf")
    return hidden if bool((hidden | (padding == 0)).all()) else padding


def _kept(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, num_heads: int
) -> Tensor | None:
    """MultiheadAttention's masks, in which True hides, as scaled_dot_product_attention's."""
    masks = []
    if attn_mask is not None:
        per_head = attn_mask.ndim == 3
        shape = (batch, num_heads) if per_head else (1, 1)
        masks.append(attn_mask.view(*shape, *attn_mask.shape[-2:]))
    if padding is not None:
        masks.append(padding[:, None, None])
    if all(mask.dtype == torch.bool for mask in masks):
        kept = [~mask for mask in masks]
        return kept[0] & kept[1] if len(kept) == 2 else kept[0] if kept else None
    added = [
        mask
        if mask.dtype != torch.bool
        else torch.zeros_like(mask, dtype=torch.float).masked_fill(mask, float("-inf"))
        for mask in masks
    ]
    return added[0] + added[1] if len(added) == 2 else added[0]
