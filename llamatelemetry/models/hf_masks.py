"""The mask of our attention under transformers: rules for which key a query sees, not a matrix.

Transformers asks a mask function once a forward what to make of a cache that is padded left or
right and perhaps longer than what was seen; without one under the attention's name it would drop
the padding silently. Ours answers with a KeyMask: to a model that reads its mask itself it is
sdpa_mask's boolean matrix, written out when something reads it; to our attention it is a KeyLayout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_fake_tensor, is_jit_tracing, is_tracing

from llamatelemetry.models.hf_layout import KeyLayout
from llamatelemetry.models.hf_plans import Plan, plan_of_layout
from llamatelemetry.models.hf_rules import adds_masks, rules_of, traced_rules


class KeyMask(Tensor):
    """A KeyLayout that reads as the boolean matrix it stands for.

    No memory is behind it until an operation reads it; the result of any is a plain tensor.
    """

    key_anchor: Tensor
    key_tokens: Tensor | None
    key_start: Tensor | None
    key_rules: tuple[int, bool, int, int]
    _matrix: Tensor | None
    _plan: Plan | None
    step: Any  # what the layers that are given this mask share: pieces/dynamic.py

    @staticmethod
    def __new__(
        cls,
        layout: KeyLayout,
        device: torch.device,
        dtype: torch.dtype = torch.bool,
        anchor: Tensor | None = None,
    ) -> KeyMask:
        shape = (layout.batch, 1, layout.seqlen_q, layout.seqlen_k)
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        start = layout.start
        # Dynamo takes a subclass that holds a tensor.
        mask.key_anchor = torch.empty(0, device=device) if anchor is None else anchor
        mask.key_tokens = layout.tokens
        mask.key_start = start if isinstance(start, Tensor) else None
        mask.key_rules = (0 if isinstance(start, Tensor) else start, *layout[4:7])
        mask._matrix = mask._plan = mask.step = None
        return mask

    def __init__(
        self,
        layout: KeyLayout,
        device: torch.device,
        dtype: torch.dtype = torch.bool,
        anchor: Tensor | None = None,
    ) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def key_layout(self) -> KeyLayout:
        batch, _, seqlen_q, seqlen_k = self.shape
        first, causal, left, right = self.key_rules
        start = first if self.key_start is None else self.key_start
        return KeyLayout(batch, seqlen_q, seqlen_k, start, causal, left, right, self.key_tokens)

    @property
    def key_plan(self) -> Plan:
        """How paged_attention reads the cache; made once for all layers that share the mask."""
        if self._plan is None:
            self._plan = plan_of_layout(self.key_layout, self.device, is_tracing())
        return self._plan

    def dense(self) -> Tensor:
        if self._matrix is None:
            self._matrix = _as_dtype(self.key_layout.dense(self.device), self.dtype)
        return self._matrix

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        same_dtype = kwargs.get("dtype") in (None, getattr(args[0], "dtype", None))
        if func is torch.ops.aten._to_copy.default and same_dtype and "device" in kwargs:
            # Accelerate sends the arguments of a layer to the layer's device.
            return _moved(args[0], torch.device(kwargs["device"]))
        args, kwargs = tree_map_only(KeyMask, KeyMask.dense, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense().clone()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        parts = ("key_anchor", "key_tokens", "key_start")
        names = [name for name in parts if getattr(self, name) is not None]
        return names, (tuple(self.shape), self.key_rules, self.device, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, outer_size: Any, outer_stride: Any) -> KeyMask:
        (batch, _, seqlen_q, seqlen_k), (start, causal, left, right), device, dtype = meta
        start, tokens = inner.get("key_start", start), inner.get("key_tokens")
        layout = KeyLayout(batch, seqlen_q, seqlen_k, start, causal, left, right, tokens)
        return KeyMask(layout, device, dtype, inner["key_anchor"])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KeyMask({self.key_layout})"


def _moved(mask: KeyMask, device: torch.device) -> KeyMask:
    layout = mask.key_layout
    start = layout.start.to(device) if isinstance(layout.start, Tensor) else layout.start
    tokens = None if layout.tokens is None else layout.tokens.to(device)
    return KeyMask(layout._replace(start=start, tokens=tokens), device, mask.dtype)


def _as_dtype(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean matrix, or of a floating dtype what eager attention adds to scores."""
    if dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of our attention; arguments as transformers' sdpa_mask takes them.

    Returns:
        None only where every query sees every key; a KeyMask for causal, sliding-window and
        bidirectional attention with any padding; the same as a plain boolean tensor with a
        ``key_layout`` while a graph is traced; sdpa_mask's matrix for rules of other kinds; the
        matrices in dtype, to be added, for models that take no sdpa
    """
    device = torch.device(device)
    kind = dtype if adds_masks(type(config)) else torch.bool
    symbolic = _is_symbolic(attention_mask, device)
    rules = None
    if not use_vmap:
        rules = (
            traced_rules(mask_function, local_size, allow_is_causal_skip, config, kv_length)
            if symbolic
            else rules_of(mask_function, kv_length + kv_offset)
        )
    if attention_mask is not None and not is_tracing(attention_mask) and not symbolic:
        is_causal = rules is not None and rules[0]
        needed = q_offset + q_length if is_causal else kv_offset + kv_length
        attention_mask = None if _keeps_all(attention_mask, needed) else attention_mask
    layout = None
    if rules is not None:
        tokens = None
        if attention_mask is not None:
            padding: Any = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            tokens = padding[:, kv_offset : kv_offset + kv_length]
        causal, left, right = rules
        start = q_offset - kv_offset
        layout = KeyLayout(batch_size, q_length, kv_length, start, causal, left, right, tokens)
        if allow_is_bidirectional_skip and tokens is None and not (causal or left >= 0):
            return None
        if not symbolic:
            return KeyMask(layout, device, kind)
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    if q_length == 1:
        # Whatever the rules are, one query sees one set of keys.
        row = mask[:, 0, 0].expand(batch_size, -1)
        layout = KeyLayout(batch_size, 1, kv_length, q_offset - kv_offset, False, -1, -1, row)
    mask = _as_dtype(mask, kind)
    return _with_layout(mask, layout) if layout is not None and mask.shape[1] == 1 else mask


def _keeps_all(attention_mask: Tensor, needed: int | Tensor) -> bool:
    """Whether no slot of the first needed ones is padding: those after them no query sees, as the
    empty ones of a static cache, which a mask does not reach. Waits for the device."""
    width = attention_mask.shape[-1]
    if isinstance(needed, Tensor):
        return bool(attention_mask.all() & (needed <= width))
    return width >= needed and bool(attention_mask.all())


def mask_of(layout: KeyLayout, device: torch.device) -> Tensor:
    """The mask of a layout, a KeyMask where no graph is traced."""
    if torch.compiler.is_compiling():
        return _with_layout(layout.dense(device), layout)
    return KeyMask(layout, device)


def _with_layout(mask: Tensor, layout: KeyLayout) -> Tensor:
    """A plain tensor that our attention takes as a layout; unread, a compiler leaves it out."""
    mask.key_layout = layout  # type: ignore[attr-defined]
    mask.key_plan = plan_of_layout(layout, mask.device, True)  # type: ignore[attr-defined]
    return mask


def _is_symbolic(attention_mask: Tensor | None, device: torch.device) -> bool:
    """Whether the mask becomes part of a traced graph, where a KeyMask would be a stranger."""
    if torch.compiler.is_compiling() or is_jit_tracing() or device.type == "meta":
        return True
    return attention_mask is not None and is_fake_tensor(attention_mask)


def dense_mask(
    mask: Tensor | None, seqlen_q: int, seqlen_k: int, window: int | None, device: torch.device
) -> Tensor:
    """Which key each query sees, [batch or 1, 1, seqlen_q, seqlen_k] bool: key_mask's mask written
    out, or without one the last seqlen_q slots' causal attention in a window."""
    if mask is not None:
        return mask.dense() if isinstance(mask, KeyMask) else mask
    left = -1 if window is None else window - 1
    layout = KeyLayout(1, seqlen_q, seqlen_k, seqlen_k - seqlen_q, True, left, -1, None)
    return layout.dense(device)
