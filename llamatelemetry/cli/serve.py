"""The serve command: an OpenAI-compatible server of one model."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from llamatelemetry.cli.batching import (
    add_batch_options,
    batch_options,
    check_batch_options,
    check_prefill_chunk,
)
from llamatelemetry.cli.cache_dtype import (
    add_cache_option,
    cache_dtype_of,
    refusals_name_the_option,
)
from llamatelemetry.cli.output import warnings_as_sentences
from llamatelemetry.cli.speculation import add_options, check_options, speculation_of
from llamatelemetry.extras import not_installed

KEY = "LLAMATELEMETRY_API_KEY"
DRAIN_S = 30.0  # how long a shutdown waits for open requests


def add_command(commands: Any) -> None:
    """Adds ``serve`` to the subparsers of the command line."""
    parser = commands.add_parser("serve", help="serve a model by the OpenAI-compatible HTTP API")
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="smollm2, a .gguf file or a directory")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: %(default)s")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: MODEL as given")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_batch_options(parser)
    add_cache_option(parser)
    add_options(parser)
    parser.add_argument(
        "--max-open", type=int, default=256, metavar="N", help="requests open at once; then 429"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of a request")
    parser.add_argument("--max-body-bytes", type=int, default=4 << 20, metavar="N")
    parser.add_argument(
        "--otel", action="store_true", help="OpenTelemetry spans and metrics (the extra otel)"
    )
    parser.add_argument("--live", action="store_true", help="show what the server does")
    parser.add_argument(
        "--pooling", choices=["mean", "last"], default="mean", help="of /v1/embeddings"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send; default: ${KEY}, or nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 after an orderly shutdown; after a sentence on stderr 2 for bad input, 1 where
    the installation cannot."""
    try:
        with warnings_as_sentences():
            try:
                return _serve(args)
            finally:
                gc.unfreeze()
    except ImportError as error:
        sentence = not_installed("serve", str(error.name), "serve")
        print(f"llamatelemetry: {sentence}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"llamatelemetry: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _check(args: argparse.Namespace) -> None:
    for name in ("max_open", "max_body_bytes"):
        if getattr(args, name) < 1:
            value = getattr(args, name)
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < args.port < 65536:
        raise ValueError(f"--port must lie in [1, 65535], got {args.port}")
    if not 0 < args.timeout < float("inf"):
        raise ValueError(f"--timeout must be finite and above 0, got {args.timeout}")
    check_batch_options(args)
    _check_address(args.host, args.port)


def _check_address(host: str, port: int) -> None:
    """Refuses an address that cannot be served, before a model is loaded for it."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"--host and --port must be an address of this machine that is free, got {host} and "
            f"{port}: {error.strerror}"
        ) from None


def _otel(model: str) -> Any:
    """
    Raises:
        ValueError: there is no opentelemetry-api.
    """
    try:
        from llamatelemetry.serving.otel import OpenTelemetry
    except ImportError as error:
        raise ValueError(not_installed("--otel", str(error.name), "otel")) from None
    return OpenTelemetry(model)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """What a start makes stays: looking for garbage in it took a tenth of the time. It is frozen;
    the end takes that back, for the interpreter would find extensions' types leaked."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _made(args: argparse.Namespace) -> tuple[Any, Any]:
    """The batcher and the application."""
    import torch

    from llamatelemetry.inference.continuous import ContinuousBatching
    from llamatelemetry.inference.engine import InferenceEngine
    from llamatelemetry.loading.find import load_model
    from llamatelemetry.serving.app import ServerConfig, create_app

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU that torch can use, and there is none")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_options(args)
    check_prefill_chunk(args, device)
    engine = InferenceEngine(load_model(args.model, device=device))
    speculation = speculation_of(args, engine.tokenizer, device)
    config = ServerConfig(
        model=args.served_model_name or args.model,
        api_key=args.api_key or os.environ.get(KEY) or None,
        max_open=args.max_open,
        max_body_bytes=args.max_body_bytes,
        timeout_s=args.timeout,
        drain_s=DRAIN_S,
        pooling=args.pooling,
    )
    with refusals_name_the_option():
        batcher = ContinuousBatching(
            args.max_batch_size,
            engine,
            speculation=speculation,
            cache_dtype=cache_dtype_of(args),
            **batch_options(args),
        )
    return batcher, create_app(batcher, config, _otel(config.model) if args.otel else None)


def _serve(args: argparse.Namespace) -> int:
    _check(args)  # before what takes seconds to import
    with _no_collections():
        import uvicorn

        batcher, app = _made(args)
    print(
        f"serving {args.served_model_name or args.model} on http://{args.host}:{args.port} "
        "(API under /v1, a chat at /)",
        file=sys.stderr,
    )
    # uvicorn passes on what it was stopped by: SIGTERM too then leaves the view in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with batcher.watch() if args.live else contextlib.nullcontext():
        uvicorn.run(
            app,
            host=args.host,
            port=args.port,
            log_level="warning",
            timeout_graceful_shutdown=int(DRAIN_S),
        )
    return 0
