"""The option of generate and serve that says what keys and values are kept in."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

# vLLM's names -> torch's; "auto" is the model's own.
_DTYPES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "int8": "int8",
}


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Adds --kv-cache-dtype."""
    parser.add_argument(
        "--kv-cache-dtype",
        choices=["auto", *_DTYPES],
        default="auto",
        help="of keys and values: 16 bits for a float32 model on the CPU, as GGUF files are there, "
        "or 8 bits (default: the model's own dtype). On the CPU packed weights round their inputs "
        "to 8 bits too, so a near tie may fall otherwise than without",
    )


def cache_dtype_of(args: argparse.Namespace) -> Any:
    """What InferenceEngine and ContinuousBatching take as cache_dtype."""
    import torch

    name = args.kv_cache_dtype
    return None if name == "auto" else getattr(torch, _DTYPES[name])


@contextlib.contextmanager
def refusals_name_the_option() -> Iterator[None]:
    """For what takes a cache_dtype: only a loaded model tells whether that serves it.

    Raises:
        ValueError: for one that does not.
    """
    from llamatelemetry.inference.kv_pages import CacheDtypeError

    try:
        yield
    except CacheDtypeError as error:
        raise ValueError(f"--kv-cache-dtype {error.what}; auto is the model's own") from None
