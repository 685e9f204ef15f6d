"""The setting of a probe: a module undisturbed, its windows shorter than the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from llamatelemetry.models.pieces.base import Piece
from llamatelemetry.models.pieces.layer import DecoderLayer
from llamatelemetry.models.pieces.watch import EVERYWHERE

_WINDOW = 3  # sliding windows are cut to this, so that the prompt is longer


class _Smooth(nn.Module):
    def __init__(self, router_scores: bool) -> None:
        super().__init__()
        self.router_scores = router_scores

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        return (x.sin(), None) if self.router_scores else x.sin()


@contextmanager
def own_mlp_left_out(piece: Piece) -> Iterator[None]:
    """Lets a smooth function stand for an MLP that a layer calls as it is.

    It is not the layer's to prove; a copy of many experts would be large, and a router's choice
    jumps where its inputs differ by a rounding.
    """
    if not isinstance(piece, DecoderLayer) or piece.spec.mlp_kind != "own":
        yield
        return
    mlp = getattr(piece.module, piece.spec.mlp)
    setattr(piece.module, piece.spec.mlp, _Smooth(piece.spec.router_scores))
    try:
        yield
    finally:
        setattr(piece.module, piece.spec.mlp, mlp)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """A module and its parts as in evaluation, without hooks, which are not to see random input.

    Torch's own stay: they make the weights of pruned and normalised linears.
    """
    parts = list(module.modules())
    modes = [(part, part.training) for part in parts]
    every = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    before = [(hooks, dict(hooks)) for hooks in (*every, *EVERYWHERE) if hooks]
    try:
        for part in parts:
            part.training = False
        for hooks, kept in before:
            for key, hook in kept.items():
                if not str(getattr(hook, "__module__", "")).startswith("torch."):
                    del hooks[key]
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for hooks, kept in before:
            hooks.clear()
            hooks.update(kept)


@contextmanager
def short_windows(piece: Piece) -> Iterator[None]:
    """Cuts every sliding window that the module or its config has, and the piece's own."""
    owners = [piece.config, *piece.module.modules()]
    windows = [(owner, getattr(owner, "sliding_window", None)) for owner in owners]
    try:
        for owner, window in windows:
            if window is not None:
                owner.sliding_window = min(window, _WINDOW)
        piece.read_window()
        yield
    finally:
        for owner, window in windows:
            if window is not None:
                owner.sliding_window = window
        piece.read_window()
