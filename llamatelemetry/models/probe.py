"""Is a replacement what it replaces? Both run on random input, and so does the module in more bits.

It is where it errs at most twice as much as the module, the rule of this package's tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llamatelemetry.models.hf_attention import NAME
from llamatelemetry.models.hf_masks import dense_mask
from llamatelemetry.models.layers import Attention, DecoderLayer, Piece
from llamatelemetry.models.merge import in_more_bits

_BATCH, _SEQLEN = 2, 9


def disagreement(piece: Piece, rotary: nn.Module, like: Tensor) -> str | None:
    """Why piece, which is not installed, may not stand for its module; None if it may.

    rotary: the model's rotary embedding
    like:   a tensor of the dtype and on the device of the hidden states
    """
    more_bits = torch.float64 if like.dtype == torch.float32 else torch.float32
    twin = in_more_bits(piece.module, more_bits, piece.config)
    generator = torch.Generator(like.device).manual_seed(0)
    x = torch.randn(
        (_BATCH, _SEQLEN, piece.width),
        generator=generator,
        device=like.device,
        dtype=like.dtype,
    )
    try:
        ours = _run(piece, piece.forward, rotary, x, NAME)
    except RuntimeError as refusal:
        return str(refusal)
    theirs = _run(piece, piece.original, rotary, x, "sdpa")
    exact = _run(piece, twin, rotary, x.to(more_bits), "sdpa").double()
    error, their_error = ((out.double() - exact).abs().max().item() for out in (ours, theirs))
    rounding = torch.finfo(like.dtype).eps * exact.abs().max().item()
    if error <= 2 * their_error + rounding:
        return None
    return (
        f"on random input it errs by {error:.3g}, more than twice the module's {their_error:.3g} "
        f"and a rounding of {rounding:.3g}"
    )


def likeness(piece: Piece) -> object:
    """Equal for pieces whose modules differ in the values of their weights alone."""
    scalars = (bool, int, float, str, type(None))
    parts = list(piece.module.named_modules())
    return (
        type(piece),
        str(piece.module),
        tuple((name, t.dtype, t.device) for name, t in piece.module.state_dict().items()),
        tuple(
            (name, key, value)
            for name, part in parts
            for key, value in vars(part).items()
            if isinstance(value, scalars) and key != "layer_idx"
        ),
    )


def _run(piece: Piece, forward: Any, rotary: Any, x: Tensor, attention: str) -> Tensor:
    if not isinstance(piece, (Attention, DecoderLayer)):
        return forward(x.clone())
    positions = torch.arange(_SEQLEN, device=x.device).unsqueeze(0)
    mask = None if attention == NAME else dense_mask(None, _SEQLEN, _SEQLEN, piece.window, x.device)
    before = piece.config._attn_implementation
    piece.config._attn_implementation = attention
    try:
        out = forward(
            hidden_states=x.clone(),
            position_embeddings=rotary(x, positions),
            attention_mask=mask,
        )
    finally:
        piece.config._attn_implementation = before
    return out[0] if isinstance(out, tuple) else out
