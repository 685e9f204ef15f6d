"""Is a replacement what it replaces? Both run on random input before it is installed.

A norm is compared with its formula in float64, any other piece with a copy of its module in more
bits. Pieces that read a cache run as generation does: a prompt, one token, then several.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from llamatelemetry.models.hf_attention import attention_forward
from llamatelemetry.models.hf_layout import KeyLayout
from llamatelemetry.models.hf_masks import mask_of
from llamatelemetry.models.pieces.arguments import CACHE_NAMES
from llamatelemetry.models.pieces.attention import Attention
from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.layer import DecoderLayer
from llamatelemetry.models.pieces.merge import in_more_bits
from llamatelemetry.models.pieces.norm import LayerNorm, Norm
from llamatelemetry.models.probe_setting import own_mlp_left_out, short_windows, undisturbed
from llamatelemetry.ops import reference

_BATCH = 2
_STEPS = (5, 1, 3)  # tokens of each forward over one cache
_PROBE = "llamatelemetry_probe"
_PROBE_OURS = "llamatelemetry_probe_ours"

_MOVED = 4  # more runs of a module that seems to be closer to the truth than we are

# How far sums of float32 over a row may be off, in units of the last place of the row's scale.
# Measured at widths from 64 to 8192 on every CPU level: at most 1.7, as torch's own.
_SUM_UNITS = 6
# How many units of the dtype's last place the roundings of normalised and weighted values cost.
_ROUNDING_UNITS = 2


def disagreement(piece: Piece, rotary: Callable[..., Any], like: Tensor) -> str | None:
    """Why piece, which is not installed, may not stand for its module; None if it may.

    Args:
        piece: bound to its module.
        rotary: gives the position_embeddings of the piece's layer, of hidden states and position
            ids; None where it has none.
        like: a tensor of the dtype and on the device of the hidden states.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    if isinstance(piece, Norm):
        return _norm_disagreement(piece, like, generator)
    with undisturbed(piece.module):
        return _step_disagreement(piece, rotary, like, generator)


def _step_disagreement(
    piece: Piece, rotary: Callable[..., Any], like: Tensor, generator: torch.Generator
) -> str | None:
    """Holds the piece and the module to a copy in more bits, on the steps of a generation."""
    more_bits = torch.float64 if like.dtype == torch.float32 else torch.float32
    inputs = [
        torch.randn(
            (_BATCH, seqlen, piece.width), generator=generator, device=like.device, dtype=like.dtype
        )
        for seqlen in _STEPS
    ]
    AttentionInterface.register(_PROBE, _attend)
    AttentionInterface.register(_PROBE_OURS, _attend_with_ours)
    with short_windows(piece), own_mlp_left_out(piece):
        attention = _PROBE if piece.ops.attn_implementation is None else _PROBE_OURS
        ours = _run(piece, piece.forward, rotary, inputs, attention).double()
        theirs = _run(piece, piece.original, rotary, inputs, _PROBE).double()
        twin = in_more_bits(piece.module, more_bits, piece.config)
        exact = _run(piece, twin, rotary, [x.to(more_bits) for x in inputs], _PROBE).double()
        error, their_error = ((out - exact).abs().max().item() for out in (ours, theirs))
        # The second term does not depend on the module's luck: its norms compute in float32
        # whatever they are given, so that the copy in more bits need be no better than ours.
        unit = torch.finfo(like.dtype).eps + _SUM_UNITS * torch.finfo(torch.float32).eps
        rounding = unit * exact.abs().max().item()
        if error <= 2 * their_error + rounding:
            return None
        # Scores in the hundreds make a softmax of last places: what the module errs is then luck,
        # on input that is about a last place off as much as ours.
        for _ in range(_MOVED if isinstance(piece, (Attention, DecoderLayer)) else 0):
            moved = [_moved(x, generator) for x in inputs]
            out = _run(piece, piece.original, rotary, moved, _PROBE).double()
            their_error = max(their_error, (out - exact).abs().max().item())
    if error <= 2 * their_error + rounding:
        return None
    return (
        f"on random input it errs by {error:.3g}, more than twice the module's {their_error:.3g} "
        f"and a rounding of {rounding:.3g}"
    )


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with each value at most about a unit of its last place away."""
    signs = torch.randint(-1, 2, x.shape, generator=generator, device=x.device)
    bits = torch.promote_types(x.dtype, torch.float32)
    return (x.to(bits) * (1 + torch.finfo(x.dtype).eps * signs)).to(x.dtype)


def likeness(kind: type[Piece], module: nn.Module) -> object:
    """Equal for modules that differ in the values of their weights alone.

    What a hook or a forward of one object's own does cannot be seen, so it makes that one alike to
    none.
    """
    scalars = (bool, int, float, str, type(None))
    return (
        kind,
        str(module),
        type(module),
        tuple(
            (name, t.shape, t.dtype, t.device) if isinstance(t, Tensor) else (name, type(t))
            for name, t in module.state_dict().items()
        ),
        tuple(
            (name, type(part), key, value)
            for name, part in module.named_modules()
            for key, value in vars(part).items()
            if isinstance(value, scalars) and key != "layer_idx"
        ),
        tuple(
            id(part)
            for part in module.modules()
            if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        ),
    )


def _norm_disagreement(piece: Norm, like: Tensor, generator: torch.Generator) -> str | None:
    """Holds the module and the op to the formula, on rows of several sizes.

    A copy with random weights stands for the module: weights of one or zero would hide what they
    are for, and a verdict is to hold for every layer's. Rows as small as eps show what eps is.
    """
    module: Any = copy.deepcopy(piece.module)
    options: Any = {"generator": generator, "device": like.device}
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = 1 + 0.5 * torch.randn(parameter.shape, **options)
        setattr(module, name, nn.Parameter(values.to(parameter.dtype), requires_grad=False))
    tensors = {name: x.double() for name, x in module.named_parameters(recurse=False)}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    sizes = torch.tensor([1.0, max(piece.eps, 1e-6) ** 0.5, 30.0], device=like.device)
    rows = torch.randn((8, 3, piece.width), **options) * sizes[:, None]
    x = rows.to(like.dtype)
    if isinstance(piece, LayerNorm):
        exact = reference.layer_norm(x.double(), weight, bias, piece.eps, piece.offset)
    else:
        assert weight is not None
        exact = reference.rms_norm(x.double(), weight, piece.eps, piece.offset)
    unit = torch.finfo(like.dtype).eps * exact.abs().amax(-1, keepdim=True)
    limit = _ROUNDING_UNITS + _SUM_UNITS * (
        torch.finfo(torch.float32).eps / torch.finfo(like.dtype).eps
    )
    twin = type(piece)(module, piece.spec, piece.config, piece.ops)
    for what, forward in (("it", twin.forward), ("the module", twin.original)):
        units = ((forward(x).double() - exact).abs() / unit).max().item()
        if not units <= limit:  # NaN is no agreement
            return (
                f"on random input {what} errs by {units:.3g} units in the last place of the row's "
                f"scale, more than {limit:.3g}, from a {type(piece).__name__} of eps {piece.eps:g}"
            )
    return None


def _run(
    piece: Piece, forward: Callable[..., Any], rotary: Any, inputs: list[Tensor], attention: str
) -> Tensor:
    """The outputs of the steps, one after another along the tokens."""
    if not isinstance(piece, (Attention, DecoderLayer)):
        return torch.cat([forward(x.clone()) for x in inputs], 1)
    outputs, cache, seen = [], _Cache(), 0
    cache_name = next(name for name in CACHE_NAMES if name in piece.parameters)
    configs = [piece.config, *(getattr(part, "config", None) for part in piece.module.modules())]
    before = [(config, config._attn_implementation) for config in configs if config is not None]
    for config, _ in before:
        config._attn_implementation = attention
    try:
        for x in inputs:
            positions = torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
            call = {
                "hidden_states": x.clone(),
                "position_ids": positions,
                "attention_mask": None,
                "use_cache": True,
                cache_name: cache,
            }
            if (angles := rotary(x, positions)) is not None:
                call["position_embeddings"] = angles
            out = forward(**call)
            outputs.append(out[0] if isinstance(out, tuple) else out)
            seen += x.shape[1]
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
    return torch.cat(outputs, 1)


class _Cache:
    """All that an attention asks of transformers' caches."""

    def __init__(self) -> None:
        self.tokens: tuple[Tensor, ...] = ()

    def update(self, *tokens: Any, **_: Any) -> tuple[Tensor, ...]:
        new = tokens[:2]  # keys and values [batch, heads, seqlen, head_dim]; then the layer
        if self.tokens:
            new = tuple(torch.cat(pair, 2) for pair in zip(self.tokens, new, strict=True))
        self.tokens = new
        return new


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a module asks of the attention interface, each of its arguments honoured or refused.

    transformers' own functions drop some: torch's attention leaves windows to the mask.
    """
    unknown = [name for name, given in others.items() if given is not None]
    if unknown or attention_mask is not None or dropout:
        raise ValueError(f"the attention's arguments must be known here, got {unknown}")
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    bits = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query.to(bits) @ key.to(bits).transpose(2, 3) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    seqlen_q, seqlen_k = scores.shape[2:]
    slots = torch.arange(seqlen_k, device=query.device)
    behind = slots[seqlen_k - seqlen_q :, None] - slots
    hidden = (behind < 0) | (behind >= (sliding_window or seqlen_k))
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.to(bits).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., :seqlen_k].to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _attend_with_ours(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Our attention under the mask that transformers makes for it."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    left = -1 if sliding_window is None else sliding_window - 1
    layout = KeyLayout(
        query.shape[0], seqlen_q, seqlen_k, seqlen_k - seqlen_q, True, left, -1, attention_mask
    )
    mask = mask_of(layout, query.device)
    return attention_forward(
        module, query, key, value, mask, sliding_window=sliding_window, **others
    )
