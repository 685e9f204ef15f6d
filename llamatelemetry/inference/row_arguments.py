"""What a generation of rows is asked for, checked without the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from llamatelemetry.inference.arguments import instance, integer
from llamatelemetry.inference.prompts import sequence
from llamatelemetry.inference.sampling import SamplingParams


def checked_rows(prompts: Any, params: Any, max_tokens: Any) -> list[list[int]]:
    """The rows' ids as lists of ints, at least one row of at least one.

    Args:
        prompts: a sequence of ids for each row.
        params: SamplingParams for each.
        max_tokens: at least 1.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    for name, several in (("prompts", prompts), ("params", params)):
        if isinstance(several, (str, bytes)) or not isinstance(several, Sequence):
            raise ValueError(f"{name} must be a list of one for each row, got {several!r:.80}")
    for one in params:
        instance("params: one", one, SamplingParams, "SamplingParams")
    if not prompts or len(prompts) != len(params):
        raise ValueError(
            f"prompts and params must be as many and at least one, got {len(prompts)} and "
            f"{len(params)}"
        )
    if integer("max_tokens", max_tokens) < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    rows = [[integer("prompt: a token id", token) for token in sequence(row)] for row in prompts]
    if not all(rows):
        raise ValueError("every prompt must hold at least one token, got an empty one")
    return rows


def check_ends(eos_token_ids: Any) -> None:
    """Refuses what is no collection of token ids.

    Raises:
        ValueError: naming the argument and the value.
    """
    instance("eos_token_ids", eos_token_ids, Collection, "a collection of token ids")
    for token in eos_token_ids:
        integer("eos_token_ids: a token id", token)
