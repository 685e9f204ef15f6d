"""The tune command: the fastest launches of Triton's matrix kernels on this GPU, in a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# Linear layers of Llama-3-8B: outputs and inputs of q, k and v, of the output and down
# projections and the vocabulary; and of gate and up.
_LAYERS = ["6144x4096", "4096x4096", "4096x14336", "128256x4096"]
_GATED = ["14336x4096"]


def add_command(commands: Any) -> None:
    """Adds ``tune`` to the subparsers of the command line."""
    parser = commands.add_parser("tune", help="search launches of Triton's kernels on this GPU")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--layer", action="append", metavar="NxK", help="a linear layer (default: Llama-3-8B's)"
    )
    parser.add_argument(
        "--gated", action="append", metavar="NxK", help="gate and up of N outputs each"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[16, 1024], metavar="M", help="(default: 16 1024)"
    )
    parser.add_argument(
        "--prefill",
        action="append",
        type=int,
        metavar="HEAD_DIM",
        help="attention over prompts (default: 128 where no layer is named)",
    )
    parser.add_argument(
        "--e4m3", action="store_true", help="layers of fp8 e4m3 instead of 16-bit ones"
    )
    parser.add_argument(
        "--out",
        default="llamatelemetry-tuned.json",
        metavar="FILE",
        help="is written after each shape and resumed; LLAMATELEMETRY_TRITON_TUNED=FILE uses it "
        "(default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; after a sentence on stderr 2 for bad input, 1 where nothing can be tuned."""
    try:
        return _tune(args)
    except (ValueError, ImportError, RuntimeError) as error:
        print(f"llamatelemetry: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _size(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise ValueError(f"a layer must be outputs x inputs, as 4096x14336, got {text!r}")
    return int(n), int(k)


def _tune(args: argparse.Namespace) -> int:
    plain, gated = args.layer, args.gated
    head_dims = args.prefill
    if plain is None and gated is None and head_dims is None:
        plain, gated = _LAYERS, None if args.e4m3 else _GATED
        head_dims = None if args.e4m3 else [128]
    if args.e4m3 and gated:
        raise ValueError("--e4m3 must be of layers without a gate, got --gated")
    sizes = [(*_size(text), False) for text in plain or ()]
    sizes += [(*_size(text), True) for text in gated or ()]
    if head_dims and min(head_dims) < 1:
        raise ValueError(f"--prefill must be at least 1, got {min(head_dims)}")
    if min(args.rows) < 1:
        raise ValueError(f"--rows must be at least 1, got {min(args.rows)}")

    import torch

    if not torch.cuda.is_available():
        raise ValueError("tune measures on a GPU that torch can use, and there is none here")
    from llamatelemetry.triton_ops.search import tune
    from llamatelemetry.triton_ops.tuning import LinearShape, prefill_rows, table_of

    path = Path(args.out)
    if path.exists():
        # Another file is refused before it is written over.
        table_of(path.read_text(), path.name)
        prefill_rows(path.read_text(), path.name)
    shapes = [LinearShape.of(m, *size) for m in args.rows for size in sizes]
    kind = "8-bit" if args.e4m3 else "16-bit"
    for _ in tune(shapes, head_dims or (), path, kind, lambda text: print(text, file=sys.stderr)):
        pass
    print(path)
    return 0
