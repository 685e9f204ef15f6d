"""The decoder that Hugging Face's Llama-like families share, over our ops: one body, two ways in.

Each piece stands for one module and serves both ways: ``forward`` takes the place of the module's
forward under transformers, ``step`` works on packed tokens without padding over a paged KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llamatelemetry.models.merge import merge_linears, merge_runs, unmerge_linears
from llamatelemetry.models.pieces.base import KNOWN_TO_LAYERS, Piece, eager_attention_of, take_cache
from llamatelemetry.models.step_input import StepInput
from llamatelemetry.ops import _contract  # noqa: F401  (loads the library)

_ops = torch.ops.llamatelemetry
_rms_norm = _ops.rms_norm.default
_fused_add_rms_norm = _ops.fused_add_rms_norm_.default
_rotary_embedding = _ops.rotary_embedding_.default
_append_kv = _ops.append_kv_.default
_paged_attention = _ops.paged_attention.default
_flash_attn_varlen = _ops.flash_attn_varlen.default

ACTIVATIONS = {
    "silu": _ops.silu_and_mul.default,
    "swish": _ops.silu_and_mul.default,
    "gelu": _ops.gelu_and_mul.default,
    "gelu_pytorch_tanh": _ops.gelu_tanh_and_mul.default,
    "gelu_new": _ops.gelu_tanh_and_mul.default,
}


@dataclass(frozen=True)
class Family:
    """Names of what a family has beyond Llama; "" is what it lacks."""

    query_norm: str = ""  # of the attention, over head_dim, before the rotary embedding
    key_norm: str = ""
    sliding_window: str = ""  # of the attention or its config
    residual_multiplier: str = ""  # of the layer
    embedding_multiplier: str = ""  # of the base model
    logits_scaling: str = ""  # of the config, divides the logits
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")


class RmsNorm(Piece):
    """``x / sqrt(mean(x²) + eps) * weight``."""

    def __init__(self, module: nn.Module, family: Family, config: Any) -> None:
        super().__init__(module, family, config)
        self.eps = float(self.module.variance_epsilon)
        self.bind()

    def bind(self) -> None:
        self.weight: Tensor = self.module.weight

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # ours have no gradients; the module's forward has
            return self.original(*args, **kwargs)
        (x,) = self.named(args, kwargs).values()
        return _rms_norm(x.contiguous(), self.weight, self.eps)


class GatedMlp(Piece):
    """``down(act(gate(x)) * up(x))`` with gate and up as one linear."""

    def __init__(self, module: nn.Module, family: Family, config: Any) -> None:
        super().__init__(module, family, config)
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {config.hidden_act!r}"
            )
        self.act_and_mul = ACTIVATIONS[config.hidden_act]
        self.bind()

    def bind(self) -> None:
        linears = [getattr(self.module, name) for name in self.family.gate_up]
        merged = merge_linears(linears)
        if merged is None:
            raise ValueError(
                f"{' and '.join(self.family.gate_up)} must be alike to become one linear"
            )
        self.gate_up, self.down = merged.forward, self.module.down_proj.forward

    def unbind(self) -> None:
        unmerge_linears([getattr(self.module, name) for name in self.family.gate_up])

    def step(self, x: Tensor) -> Tensor:
        return self.down(self.act_and_mul(self.gate_up(x)))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        return self.step(*self.named(args, kwargs).values())


@dataclass(frozen=True)
class _Projection:
    """Neighbours among q, k and v that are one linear, and the norms over their heads."""

    linear: Callable[[Tensor], Tensor]
    heads: list[int]
    norms: list[tuple[Tensor, float] | None]

    def parts(self, x: Tensor, head_dim: int) -> list[Tensor]:
        """[num_tokens, heads, head_dim] each."""
        rows = self.linear(x).view(x.shape[0], -1, head_dim)
        parts = list(rows.split(self.heads, 1))
        for i, norm in enumerate(self.norms):
            if norm is not None:
                # A slice's rows are not evenly spaced, so its norm runs over all rows: one launch
                # and no copy, and the heads too many cost less than another launch.
                parts[i] = _rms_norm(rows, *norm).split(self.heads, 1)[i]
        return parts


class Attention(Piece):
    """q, k and v as one linear, rotary embedding in place, attention, the output projection."""

    known = KNOWN_TO_LAYERS

    def __init__(self, module: nn.Module, family: Family, config: Any) -> None:
        super().__init__(module, family, config)
        self.head_dim = int(self.module.head_dim)
        num_kv = config.num_key_value_heads
        self._num_heads = (config.num_attention_heads, num_kv, num_kv)
        self._norm_names = (family.query_norm, family.key_norm, "")
        self.scale = float(self.module.scaling)
        self.read_window()
        self.bind()

    def read_window(self) -> None:
        self.window = sliding_window_of(self.module, self.family, self.config)
        self.window_left = -1 if self.window is None else self.window - 1
        self.interface_kwargs = (
            {"sliding_window": self.window} if self.family.sliding_window else {}
        )

    def bind(self) -> None:
        self.linears = [getattr(self.module, name) for name in self.family.qkv]
        heads, norms = list(self._num_heads), [self._norm(name) for name in self._norm_names]
        self.projections = []
        for linear, count in merge_runs(self.linears):
            self.projections.append(_Projection(linear.forward, heads[:count], norms[:count]))
            del heads[:count], norms[:count]
        self.o = self.module.o_proj.forward

    def _norm(self, name: str) -> tuple[Tensor, float] | None:
        norm = getattr(self.module, name) if name else None
        return None if norm is None else (norm.weight, float(norm.variance_epsilon))

    def unbind(self) -> None:
        unmerge_linears(self.linears)

    def project(self, x: Tensor) -> list[Tensor]:
        """q, k, v [num_tokens, heads, head_dim] of x [num_tokens, hidden_size]; q and k normed."""
        return [part for one in self.projections for part in one.parts(x, self.head_dim)]

    def step(
        self,
        x: Tensor,
        step: StepInput,
        rope: tuple[Tensor, Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        q, k, v = self.project(x)
        _rotary_embedding(q, k, *rope, step.positions, False)
        _append_kv(k, v, k_cache, v_cache, step.slot_mapping)
        scores = (self.scale, True, self.window_left, -1, 0.0)
        starts, longest = step.cu_seqlens_q, step.max_seqlen_q
        if step.is_whole:
            out, _ = _flash_attn_varlen(
                q, k, v, starts, starts, longest, longest, None, None, *scores, 0
            )
        else:
            cache = (k_cache, v_cache, step.block_table, step.cache_seqlens)
            out, _ = _paged_attention(q, *cache, starts, longest, *scores)
        return self.o(out.view(x.shape[0], -1))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        call = self.named(args, kwargs)
        hidden_states, (cos, sin) = call.pop("hidden_states"), call.pop("position_embeddings")
        attention_mask, cache = call.pop("attention_mask", None), take_cache(call)
        batch, seqlen, hidden_size = hidden_states.shape
        q, k, v = self.project(hidden_states.reshape(-1, hidden_size))
        cos, sin = (x.expand(batch, -1, -1).flatten(0, 1) for x in (cos, sin))
        _rotary_embedding(q, k, cos, sin, None, False)
        q, k, v = (x.unflatten(0, (batch, seqlen)).transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            # Modules that call it "cache" also hand it their keywords, which a paged one fills in.
            extra = {"kwargs": call} if "cache" in self.parameters else {}
            k, v = cache.update(k, v, self.module.layer_idx, **extra)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,
            eager_attention_of(self.module),
        )
        dropout = self.module.attention_dropout if self.module.training else 0.0
        call |= self.interface_kwargs
        out, weights = attend(
            self.module, q, k, v, attention_mask, dropout=dropout, scaling=self.scale, **call
        )
        return self.o(out.reshape(batch, seqlen, -1)), weights


class DecoderLayer(Piece):
    """Attention and MLP, each added to the residual; the sum and the next norm are one op."""

    known = KNOWN_TO_LAYERS

    def __init__(self, module: nn.Module, family: Family, config: Any) -> None:
        super().__init__(module, family, config)
        self.norm: Any = self.module.post_attention_layernorm
        self.multiplier = number_of(module, family.residual_multiplier)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        if torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        call = self.named(args, kwargs)
        hidden_states = call.pop("hidden_states")
        x, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **call)
        residual = hidden_states.clone()  # the caller may keep its tensor
        if self.multiplier != 1.0:
            x = x * self.multiplier
        _fused_add_rms_norm(x, residual, self.norm.weight, self.norm.variance_epsilon)
        x = module.mlp(x)
        if self.multiplier != 1.0:
            x = x * self.multiplier
        return residual.add_(x)


def sliding_window_of(attention: nn.Module, family: Family, config: Any) -> int | None:
    """How many keys a query of this attention sees, its own included; None without a limit."""
    name = family.sliding_window
    return getattr(attention if hasattr(attention, name) else config, name) if name else None


def number_of(owner: Any, name: str) -> float:
    """A factor that a family has under this name; 1 where it has none."""
    return float(getattr(owner, name)) if name else 1.0
