"""The profile command: the GPU kernels of a generation, and whether they are those expected."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from llamatelemetry.cli.output import emit

_NAME_WIDTH = 100


def add_command(commands: Any) -> None:
    """Adds ``profile`` to the subparsers of the command line."""
    parser = commands.add_parser("profile", help="the GPU kernels of a generation")
    parser.set_defaults(run=run)
    parser.add_argument("--model", default="smollm2", help="as generate's (default: %(default)s)")
    parser.add_argument("--backend", choices=["native", "triton"], help="as generate's")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="N", help="random ones (default: 128)"
    )
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="of the table")
    parser.add_argument(
        "--expect",
        choices=["triton"],
        help="exit with 1 where a kernel is of cuBLAS, cuDNN, CUTLASS, ours in CUDA, or unknown",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; after a sentence on stderr 2 for bad input, 1 where a kernel is not of those
    expected or the installation cannot run it."""
    try:
        return _profile(args)
    except (ValueError, ImportError) as error:
        print(f"llamatelemetry: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _profile(args: argparse.Namespace) -> int:
    import torch

    for name in ("batch", "prompt_tokens", "tokens"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not torch.cuda.is_available():
        raise ValueError("profile names the kernels of a GPU that torch can use, and there is none")

    from llamatelemetry.inference.engine import InferenceEngine
    from llamatelemetry.inference.sampling import GREEDY, SamplingParams
    from llamatelemetry.loading.find import load_model
    from llamatelemetry.profiling.kernels import kernels_of, why_not_only

    engine = InferenceEngine(load_model(args.model, device="cuda"), backend=args.backend)
    vocab_size = engine.loaded.model.get_input_embeddings().weight.shape[0]
    prompts = torch.randint(0, vocab_size, (args.batch, args.prompt_tokens)).tolist()

    def generate() -> None:
        for params in (GREEDY, SamplingParams(temperature=0.8, top_k=40, top_p=0.9)):
            for _ in engine.generator.generate(prompts, [params] * args.batch, args.tokens):
                pass

    generate()  # the tables, the graph and what is compiled are made once, and are no step
    kernels = kernels_of(generate)
    for kernel in kernels[: args.rows]:
        emit(
            f"{kernel.share:6.1%} {kernel.us:11.1f} us {kernel.calls:6} x {kernel.maker:<14} "
            f"{kernel.name:.{_NAME_WIDTH}}\n"
        )
    if args.expect and (reason := why_not_only(args.expect, kernels)) is not None:
        print(f"llamatelemetry: --expect {args.expect}: {reason}", file=sys.stderr)
        return 1
    return 0
