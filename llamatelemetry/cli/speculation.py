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
        help="drafted for a request and a step, up to 15, by prompt lookup if there is no "
        "--draft-model (default: 0, none; with --draft-model 4)",
    )
    parser.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a smaller model with the tokenizer of the one that it drafts for, named as that is. "
        "On the CPU packed weights round their inputs to 8 bits, so a near tie may fall otherwise "
        "than without",
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


def speculation_of(
    args: argparse.Namespace, tokenizer: Any, device: str, exact: bool = False
) -> Any:
    """The SpeculationConfig that is asked for, its draft model loaded; None for none.

    Args:
        args: that check_options let through.
        tokenizer: of the model that is drafted for.
        device, exact: as in load_model.

    Raises:
        ModelFileError, ValueError: as load_model; for a draft model of another tokenizer.
    """
    from llamatelemetry.inference.speculation_config import SpeculationConfig
    from llamatelemetry.loading.find import load_model

    count = args.num_speculative_tokens
    given = {} if count is None else {"num_speculative_tokens": count}
    if args.draft_model is not None:
        loaded = load_model(args.draft_model, device=device, exact=exact)
        _check_tokenizer(loaded.tokenizer, tokenizer)
        return SpeculationConfig(**given, draft_model=loaded.model)
    return SpeculationConfig(**given) if count else None


def _check_tokenizer(draft: Any, target: Any) -> None:
    """Refuses one whose ids are other tokens. Ids that one of them alone has, as padding of the
    vocabulary, may be anything."""
    theirs, wanted = ({i: token for token, i in one.get_vocab().items()} for one in (draft, target))
    for i in sorted(theirs.keys() & wanted.keys()):
        if theirs[i] != wanted[i]:
            raise ValueError(
                "--draft-model must have the tokenizer of the model that it drafts for, whose "
                f"token {i} is {wanted[i]!r:.80}, got one whose is {theirs[i]!r:.80}"
            )
