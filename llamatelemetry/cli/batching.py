"""The options of serve that say how requests share the steps and the cache."""

from __future__ import annotations

import argparse
from typing import Any

# Of each the least value, as ContinuousBatching has it.
_LEAST = {"max_batch_size": 1, "prefill_chunk": 1, "num_blocks": 1, "num_host_blocks": 0}


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Adds --max-batch-size, --prefill-chunk, --num-blocks and --num-host-blocks."""
    parser.add_argument(
        "--max-batch-size", type=int, default=16, metavar="N", help="requests at work at once"
    )
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens of prompts in a step beside requests that decode, which wait less with fewer "
        "(default: 512 on a GPU, 64 on the CPU; at most a step's tokens, 4096 and 256 there, or "
        "--max-batch-size where that is more)",
    )
    parser.add_argument(
        "--num-blocks",
        type=int,
        metavar="N",
        help="blocks of 64 tokens in the cache; default: it grows with what is open",
    )
    parser.add_argument(
        "--num-host-blocks",
        type=int,
        default=0,
        metavar="N",
        help="blocks in the host's memory, for requests that give theirs up",
    )


def check_batch_options(args: argparse.Namespace) -> None:
    """Refuses numbers, before a model is loaded for them.

    Raises:
        ValueError: for one that is too small.
    """
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_prefill_chunk(args: argparse.Namespace, device: str) -> None:
    """Refuses what no step has room for, before a model is loaded for it.

    Raises:
        ValueError: with both numbers.
    """
    from llamatelemetry.inference.step_limits import StepLimits

    most, asked = StepLimits(args.max_batch_size).step_tokens(device), args.prefill_chunk
    if asked is not None and asked > most:
        raise ValueError(
            f"--prefill-chunk must be at most {most}, the tokens of a step on {device}, got {asked}"
        )


def batch_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ContinuousBatching is given beside its size."""
    return {name: getattr(args, name) for name in _LEAST if name != "max_batch_size"}
