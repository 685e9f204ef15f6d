"""What forward each piece of a plan has part in. No torch."""

from __future__ import annotations

from collections.abc import Callable

from llamatelemetry.inference.plan import Piece, Plan

# Of pieces: who decodes, likewise with logits that the host looks at, prompts that go on, others.
KINDS = ("decoding", "watched", "continued", "whole")


def kinds_of(
    plan: Plan, is_watched: Callable[[Piece], bool], are_apart: bool = False
) -> dict[str, list[Piece]]:
    """A plan's pieces by their kind; where any has a draft, all that decode are "verified".

    Args:
        plan: of the step.
        is_watched: of a piece that decodes, whether the host looks at its logits.
        are_apart: whether a prompt's last token alone goes the way of longer pieces, as it does
            where siblings draw too: no bit depends on whether there are any.
    """
    kinds: dict[str, list[Piece]] = {}
    for piece in plan.pieces:
        kinds.setdefault(_kind_of(piece, is_watched, are_apart), []).append(piece)
    if plan.has_drafts:
        one_token = [kinds.pop(kind, []) for kind in KINDS[:2]]
        kinds["verified"] = [piece for pieces in one_token for piece in pieces]
    return kinds


def _kind_of(piece: Piece, is_watched: Callable[[Piece], bool], are_apart: bool) -> str:
    if piece.begin == 0:
        return "whole"
    # Siblings' first tokens are drawn with a prompt's; a decode step gives one token a row.
    if not piece.draws or piece.request.siblings or piece.end - piece.begin > 1:
        return "continued"
    if are_apart and piece.end <= len(piece.request.prompt):
        return "continued"
    return "watched" if is_watched(piece) else "decoding"
