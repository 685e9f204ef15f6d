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
        "(default: 512 on a GPU, 64 on the CPU)",
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


def batch_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ContinuousBatching is given beside its size."""
    return {name: getattr(args, name) for name in _LEAST if name != "max_batch_size"}
