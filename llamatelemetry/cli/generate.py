"""The generate command: a model file or directory and a prompt in, streamed text out."""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


def add_command(commands: Any) -> None:
    """Adds ``generate`` to the subparsers of the command line."""
    parser = commands.add_parser("generate", help="stream a model's answer to a prompt")
    parser.set_defaults(run=run)
    parser.add_argument("prompt", metavar="PROMPT", help="what the model answers")
    parser.add_argument(
        "--model",
        default="smollm2",
        help="smollm2, a .gguf file or a transformers directory (default: %(default)s)",
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps every token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--exact", action="store_true", help="float32 activations in quantised linears on the CPU"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also run plain transformers on the same weights"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; after a sentence on stderr 2 for bad input, 1 where the installation cannot."""
    try:
        return _generate(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"llamatelemetry: {_missing(error)}", file=sys.stderr)
        return 1
    except (ValueError, MemoryError, RuntimeError) as error:
        sentence = _refusal(error)
        if sentence is None:
            raise
        print(f"llamatelemetry: {sentence}", file=sys.stderr)
        return 2


def _missing(error: ImportError) -> str:
    """The sentence for a package that is not there or a library that does not load."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return (
            f"generate needs {error.name}, which is not installed; install what it needs with: "
            'pip install --no-build-isolation ".[hf]"'
        )
    return " ".join(str(error).removeprefix("llamatelemetry: ").split())


def _refusal(error: Exception) -> str | None:
    """The sentence for an error that is the input's or the machine's, None for one of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return text
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    if isinstance(error, MemoryError) or out_of_memory:
        return f"out of memory; use a smaller model or fewer --max-tokens ({text})"
    return None


def _generate(args: argparse.Namespace) -> int:
    import torch

    from llamatelemetry.inference.sampling import SamplingParams

    params = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
    )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda needs a CUDA GPU that torch can use, and there is none here"
        )
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    from llamatelemetry.inference.engine import InferenceEngine
    from llamatelemetry.loading.find import load_model

    with _progress_bar("loading") as progress:
        loaded = load_model(args.model, device=device, exact=args.exact, progress=progress)
    engine = InferenceEngine(loaded)
    for piece in engine.stream(args.prompt, params, args.max_tokens, args.stop):
        print(piece, end="", flush=True)
    print()
    rows = [*_rows(engine.stats), _peak_memory()]
    print(" · ".join(f"{name} {value}" for name, value in rows), file=sys.stderr)
    if args.compare:
        plain = _plain_transformers(args, engine, device)
        print(f"{'':18}{'llamatelemetry':>18}{'transformers':>18}", file=sys.stderr)
        for (name, ours), (_, theirs) in zip(_rows(engine.stats), _rows(plain), strict=True):
            print(f"{name:18}{ours:>18}{theirs:>18}", file=sys.stderr)
    return 0


def _rows(stats: Any) -> list[tuple[str, str]]:
    """What a GenerationStats says, as label and value."""
    return [
        ("prompt", f"{stats.prompt_tokens} tokens"),
        ("generated", f"{stats.generated_tokens} tokens"),
        ("first token", f"{stats.first_token_s:.3f} s"),
        ("prompt speed", f"{stats.prompt_tokens_per_s:.0f} tok/s"),
        ("generation speed", f"{stats.decode_tokens_per_s:.1f} tok/s"),
    ]


def _peak_memory() -> tuple[str, str]:
    import torch

    if torch.cuda.is_initialized():
        return "peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "peak memory", f"{peak_kib / 2**10:.0f} MiB"


def _plain_transformers(args: argparse.Namespace, engine: Any, device: str) -> Any:
    """GenerationStats of transformers' generate: same weights, dense in bfloat16, same prompt."""
    import torch

    from llamatelemetry.inference.engine import GenerationStats
    from llamatelemetry.loading.dense import load_dense

    model = load_dense(args.model, device=device, dtype=torch.bfloat16)
    ids = torch.tensor([engine.encode(args.prompt)], device=device)
    times: list[float] = []

    class _Clock:
        def put(self, _: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None: ...

    options = {"do_sample": False, "max_new_tokens": engine.stats.generated_tokens}
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=_Clock(), pad_token_id=0, **options
        )
    arrivals = times[1:]  # the streamer is handed the prompt first
    return GenerationStats(
        ids.shape[1], len(arrivals), arrivals[0] - start, arrivals[-1] - arrivals[0]
    )


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callable(done, total) that draws on stderr when a person watches, else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
