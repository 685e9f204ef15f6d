"""The options of generate and serve that have tokens drafted."""

from __future__ import annotations

import argparse
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --num-speculative-tokens and --draft-model."""
    parser.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help="drafted for a request and a step at most, by prompt lookup if there is no "
        "--draft-model (default: 0, none; with --draft-model 4)",
    )
    parser.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a smaller model with the tokenizer of the one that it drafts for, named as that is",
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuses numbers, before a model is loaded for them.

    Raises:
        ValueError: for a number below 0 or above 15, or 0 with a draft model.
    """
    from llamatelemetry.inference.speculation_config import MAX_DRAFT

    count, least = args.num_speculative_tokens, 0 if args.draft_model is None else 1
    if count is not None and not least <= count <= MAX_DRAFT:
        beside = " with --draft-model" if least else ""
        raise ValueError(
            f"--num-speculative-tokens must lie in [{least}, {MAX_DRAFT}]{beside}, got {count}"
        )


def speculation_of(args: argparse.Namespace, device: str, exact: bool = False) -> Any:
    """The SpeculationConfig that is asked for, its draft model loaded; None for none.

    Args:
        args: that check_options let through.
        device, exact: as in load_model.

    Raises:
        ModelFileError, ValueError: as load_model.
    """
    from llamatelemetry.inference.speculation_config import SpeculationConfig
    from llamatelemetry.loading.find import load_model

    count = args.num_speculative_tokens
    given = {} if count is None else {"num_speculative_tokens": count}
    if args.draft_model is not None:
        draft = load_model(args.draft_model, device=device, exact=exact).model
        return SpeculationConfig(**given, draft_model=draft)
    return SpeculationConfig(**given) if count else None
