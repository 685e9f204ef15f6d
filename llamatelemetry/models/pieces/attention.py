"""Attention: projections and their norms, rotary embedding, attention, the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llamatelemetry.models.opset import NATIVE, OpSet
from llamatelemetry.models.pieces.angles import rows_of_angles
from llamatelemetry.models.pieces.arguments import KNOWN_TO_LAYERS, take_cache, without_encoder
from llamatelemetry.models.pieces.base import Piece, eager_attention_of
from llamatelemetry.models.pieces.linear import Joined, Rows
from llamatelemetry.models.pieces.merge import columns_of, merge_runs, rows_of, unmerge_linears
from llamatelemetry.models.pieces.norm import EPS_NAMES, eps_of, offset_of
from llamatelemetry.models.spec import LayerSpec
from llamatelemetry.models.step_input import StepInput
from llamatelemetry.quantization.rows import RowFormat

Norm = tuple[Tensor, float, float]  # weight, eps, what is added to the weight


@dataclass(frozen=True)
class _Projection:
    """Neighbours among q, k and v that are one linear, and the norms before the rotation."""

    linear: Joined
    heads: list[int]
    by_head: bool  # q, k and v of a head beside each other
    norms: list[Norm | None]
    whole: bool  # the norms are over all heads together
    ops: OpSet
    head_dim: int

    def parts(self, x: Rows) -> list[Tensor]:
        """[num_tokens, heads, head_dim] each."""
        rows = self.linear(x).view(x.shape[0], -1, self.head_dim)
        if self.by_head:
            return [rows[:, i::3] for i in range(3)]
        parts = list(rows.split(self.heads, 1))
        for i, norm in enumerate(self.norms):
            if norm is None:
                continue
            if self.whole:
                parts[i] = self.ops.rms_norm(parts[i].flatten(1), *norm).view_as(parts[i])
            else:
                # A slice's rows are not evenly spaced, so its norm runs over all rows: one launch
                # and no copy, and the heads too many cost less than another launch.
                parts[i] = self.ops.rms_norm(rows, *norm).split(self.heads, 1)[i]
        return parts


class Attention(Piece):
    """q, k and v as one linear, rotary embedding in place, attention, the output projection."""

    known = KNOWN_TO_LAYERS

    def __init__(
        self, module: nn.Module, spec: LayerSpec, config: Any, ops: OpSet = NATIVE
    ) -> None:
        super().__init__(module, spec, config, ops)
        self.head_dim = int(getattr(self.module, spec.head_dim))
        self.scale = float(getattr(self.module, spec.scale))
        self.softcap = float(getattr(self.module, spec.softcap) or 0.0) if spec.softcap else 0.0
        self.interleaved = spec.rope == "interleaved"
        self.read_window()
        self.turns = self._turns()
        self.bind()

    def read_window(self) -> None:
        self.window = self.window_now()
        self.interface_kwargs: dict[str, Any] = {}
        if self.spec.window:
            self.interface_kwargs["sliding_window"] = self.window
        if self.spec.softcap:
            self.interface_kwargs["softcap"] = self.softcap or None
        left = -1 if self.window is None else self.window - 1
        self.scores = (self.scale, True, left, -1, self.softcap)  # causal, nothing to the right

    def window_now(self) -> int | None:
        """Keys that a query sees at most, by the module as it is now; None for all."""
        if not (name := self.spec.window):
            return None
        owner = self.module if hasattr(self.module, name) else self.config
        window: int | None = getattr(owner, name)
        return window if getattr(self.module, "is_sliding", True) else None

    def _turns(self) -> bool:
        spec = self.spec
        if spec.rope == "none":
            return False
        if spec.use_rope == "window":
            return self.window is not None or getattr(self.config, spec.window, None) is None
        return bool(getattr(self.module, spec.use_rope)) if spec.use_rope else True

    def bind(self) -> None:
        spec = self.spec
        self.linears = [getattr(self.module, name) for name in spec.qkv]
        output = getattr(self.module, spec.output)
        heads = self._heads(output)
        self.num_heads_kv = heads[1]
        norms: list[Norm | None] = [None, None, None]
        if spec.qk_norm != "none":
            norms = [*(self._norm(name) for name in spec.qk_norm_names), None]
        self.norms_after: list[Norm | None] = []
        if spec.qk_norm_after_rope:
            self.norms_after, norms = norms[:2], [None, None, None]
        self.projections = []
        rest = self.linears
        for linear, count in merge_runs(self.linears):
            joined, rest = Joined(linear, rest[:count], self.ops), rest[count:]
            if count > 1:
                self.merged.append(linear)
            parts = 3 if len(self.linears) == 1 else count
            self.projections.append(
                _Projection(
                    joined,
                    heads[:parts],
                    spec.qkv_order == "heads",
                    norms[:parts],
                    spec.qk_norm == "full",
                    self.ops,
                    self.head_dim,
                )
            )
            del heads[:parts], norms[:parts]
        self.packed = self._packed()
        self.o = Joined(output, (), self.ops)

    def _packed(self) -> tuple[Tensor | None, Tensor | None, float, float] | None:
        """The norms as rope_append_kv_ takes them, where it does this layer's work; else None."""
        one, turned_last = self.projections[0], self.turns and not self.norms_after
        if len(self.projections) > 1 or one.by_head or not turned_last or self.head_dim > 256:
            return None
        q_norm, k_norm, _ = one.norms
        settings = {norm[1:] for norm in (q_norm, k_norm) if norm is not None}
        if len(settings) > 1 or (settings and one.whole):
            return None
        eps, offset = settings.pop() if settings else (0.0, 0.0)
        return q_norm and q_norm[0], k_norm and k_norm[0], eps, offset

    def _heads(self, output: Any) -> list[int]:
        """Heads of q, k and v, from the weights: a shard of a model has a share of them."""
        rows = [rows_of(linear) for linear in self.linears]
        if len(rows) == 1:
            num_q = columns_of(output)
            rows = [num_q, *[(rows[0] - num_q) // 2] * 2]
        return [count // self.head_dim for count in rows]

    def _norm(self, name: str) -> Norm:
        norm = getattr(self.module, name)
        return norm.weight, eps_of(norm), offset_of(self.spec.norm)

    def merged_names(self) -> Sequence[str]:
        return self.spec.qkv

    def numbers(self) -> list[tuple[Any, str]]:
        spec, module = self.spec, self.module
        names = (spec.scale, spec.softcap, spec.use_rope, spec.head_dim, "is_sliding")
        norms = [getattr(module, n) for n in spec.qk_norm_names if spec.qk_norm != "none"]
        return [
            *((module, name) for name in names if name),
            *((owner, spec.window) for owner in (module, self.config) if spec.window),
            *((norm, name) for norm in norms for name in EPS_NAMES),
        ]

    def unbind(self) -> None:
        unmerge_linears(self.linears)

    @property
    def takes(self) -> RowFormat | None:
        """How step takes rows that are quantised already; None where it takes none."""
        kinds = {one.linear.takes for one in self.projections}
        return kinds.pop() if len(kinds) == 1 else None

    def project(self, x: Rows) -> list[Tensor]:
        """q, k, v [num_tokens, heads, head_dim] of x [num_tokens, hidden_size]."""
        return [part for one in self.projections for part in one.parts(x)]

    def turn(
        self,
        q: Tensor,
        k: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        positions: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """q and k after the rotary embedding, in place, and the norms that come after it."""
        if self.turns and rope is not None:
            self.ops.rotary_embedding_(q, k, *rope, positions, self.interleaved)
        if self.norms_after:
            q, k = (
                x if norm is None else self.ops.rms_norm(x.contiguous(), *norm)
                for x, norm in zip((q, k), self.norms_after, strict=True)
            )
        return q, k

    def step(
        self,
        x: Rows,
        step: StepInput,
        rope: tuple[Tensor, Tensor] | None,
        cache: Sequence[Tensor],
    ) -> Tensor:
        return self.ops.all_reduce(self.o(self.before_output(x, step, rope, cache)))

    def before_output(
        self,
        x: Rows,
        step: StepInput,
        rope: tuple[Tensor, Tensor] | None,
        cache: Sequence[Tensor],
    ) -> Tensor:
        """What the output projection takes of a step, [num_tokens, num_heads_q * head_dim]."""
        k_cache, v_cache, *scales = cache
        if self.packed is not None and rope is not None:
            one = self.projections[0]
            qkv = one.linear(x).view(x.shape[0], -1, self.head_dim)
            slots = (k_cache, v_cache, step.slot_mapping)
            angles = (*rope, step.positions, self.interleaved)
            self.ops.rope_append_kv_(qkv, *angles, *slots, *self.packed, *scales)
            q, k, v = qkv.split(one.heads, 1)
        else:
            q, k, v = self.project(x)
            q, k = self.turn(q, k, rope, step.positions)
            self.ops.append_kv_(k, v, k_cache, v_cache, step.slot_mapping, *scales)
        if not step.parts:
            out = self._attended(q, k, v, step, cache)
        else:
            out = torch.cat(
                [
                    self._attended(q[begin:end], k[begin:end], v[begin:end], part, cache)
                    for begin, end, part in step.parts
                ]
            )
        return out.view(x.shape[0], -1)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, step: StepInput, cache: Sequence[Tensor]
    ) -> Tensor:
        """Attention of tokens [num_tokens, heads, head_dim] whose keys and values are in the cache
        already."""
        k_cache, v_cache, *scales = cache
        starts, longest = step.cu_seqlens_q, step.max_seqlen_q
        more = {"sinks": getattr(self.module, self.spec.sinks)} if self.spec.sinks else {}
        if step.is_whole:
            return self.ops.flash_attn_varlen(q, k, v, starts, longest, *self.scores, **more)
        where = (k_cache, v_cache, step.block_table, step.cache_seqlens)
        if scales:
            more["scales"] = scales
        if step.split_size:
            more["split_size"] = step.split_size
        return self.ops.paged_attention(q, *where, starts, longest, *self.scores, **more)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.stands_aside(args, kwargs):
            return self.run_original(*args, **kwargs)
        call = self.named(args, kwargs)
        lacks_angles = self.turns and call.get("position_embeddings") is None
        if not without_encoder(call) or lacks_angles:
            return self.run_original(*args, **kwargs)
        hidden_states, angles = call.pop("hidden_states"), call.pop("position_embeddings", None)
        attention_mask, cache = call.pop("attention_mask", None), take_cache(call)
        batch, seqlen, hidden_size = hidden_states.shape
        q, k, v = self.project(hidden_states.reshape(-1, hidden_size))
        rope = None
        if angles is not None:
            rope = rows_of_angles(self.spec, angles, batch, q.dtype)
        q, k = self.turn(q, k, rope, None)
        q, k, v = (x.unflatten(0, (batch, seqlen)).transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            # Modules that call it "cache" also hand it their keywords, which a paged one fills in.
            extra = {"kwargs": call} if "cache" in self.parameters else {}
            k, v = cache.update(k, v, self.module.layer_idx, **extra)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_of(self.module)
        )
        call |= self.interface_kwargs
        if self.spec.sinks:
            call["s_aux"] = getattr(self.module, self.spec.sinks)
        out, weights = attend(
            self.module, q, k, v, attention_mask, dropout=0.0, scaling=self.scale, **call
        )
        return self.ops.all_reduce(self.o(out.reshape(batch, seqlen, -1))), weights
