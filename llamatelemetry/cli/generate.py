"""The generate command: a model file or directory and a prompt in, streamed text out."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from llamatelemetry.cli.cache_dtype import (
    add_cache_option,
    cache_dtype_of,
    refusals_name_the_option,
)
from llamatelemetry.cli.output import OutputError, emit, warnings_as_sentences
from llamatelemetry.cli.speculation import add_options, check_options, speculation_of
from llamatelemetry.extras import not_installed

_SAMPLING = (
    ("temperature", float, "T", "0 is greedy", "0"),
    ("top-k", int, "K", "keeps the K most likely tokens, 0 every one", "0"),
    ("top-p", float, "P", "keeps the most likely tokens up to this mass", "1"),
    ("min-p", float, "P", "keeps tokens at least P times as likely as the best", "0"),
    ("repetition-penalty", float, "R", "above 1 repeats less", "1"),
)


def add_command(commands: Any) -> None:
    """Adds ``generate`` to the subparsers of the command line."""
    parser = commands.add_parser("generate", help="stream a model's answer to a prompt")
    parser.set_defaults(run=run)
    parser.add_argument("prompt", metavar="PROMPT", help="what the model answers")
    parser.add_argument(
        "--model",
        default="smollm2",
        help="smollm2, a .gguf file, a directory of transformers or peft, or the id of a model in "
        "the Hugging Face cache (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt before the prompt")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    own = "(default: the model's generation_config, else {})"
    for name, kind, letter, what, default in _SAMPLING:
        parser.add_argument(
            f"--{name}", type=kind, metavar=letter, help=f"{what} {own.format(default)}"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    add_options(parser)
    add_cache_option(parser)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--backend",
        choices=["native", "triton"],
        help="whose kernels run: ours in C++ and CUDA, or Triton's (default: native, and triton "
        "on a GPU that this build has no kernels for)",
    )
    parser.add_argument(
        "--exact", action="store_true", help="float32 activations in quantised linears on the CPU"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also run plain transformers on the same weights"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; after a sentence on stderr 2 for bad input, 1 where the installation cannot or
    something unexpected happened."""
    try:
        with warnings_as_sentences():
            return _generate(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        if args.traceback or isinstance(error, OutputError):
            raise
        code, sentence = _refusal(error)
        print(f"llamatelemetry: {sentence}", file=sys.stderr)
        return code


def _missing(error: ImportError) -> str:
    """The sentence for a package that is not there or a library that does not load."""
    # transformers says of a module that it cannot be imported, and in the cause why.
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    absent = [e.name for e in chain if isinstance(e, ModuleNotFoundError) and e.name]
    if absent:
        return not_installed("generate", absent[-1], "hf")
    return " ".join(str(error).removeprefix("llamatelemetry: ").split())


def _refusal(error: Exception) -> tuple[int, str]:
    """Exit code and sentence for an error."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return 1, _missing(error)
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    if isinstance(error, MemoryError) or out_of_memory:
        return 2, f"out of memory; use a smaller model or fewer --max-tokens ({text})"
    if isinstance(error, (ValueError, FloatingPointError)):
        return 2, text
    return 1, f"{type(error).__name__}: {text:.300}; --traceback shows where it came from"


def _text(name: str, argument: str) -> str:
    """An argument of the command line as text; its bytes are UTF-8 whatever the locale says."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError as error:
        what = f"the byte 0x{error.object[error.start]:02x} at {error.start}"
    except UnicodeEncodeError as error:
        what = f"half a surrogate pair at {error.start}"
    raise ValueError(f"{name} must be UTF-8, got {what}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of sampling that the command line has."""
    names = [name.replace("-", "_") for name, *_ in _SAMPLING]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return given | {"seed": args.seed}


def _quiet_transformers() -> None:
    """What goes wrong is said in a sentence of ours, and a bar is for who watches."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _generate(args: argparse.Namespace) -> int:
    import torch

    from llamatelemetry.inference.sampling import SamplingParams

    prompt, given = _text("PROMPT", args.prompt), _given(args)
    system = None if args.system is None else _text("--system", args.system)
    stops = [_text("--stop", stop) for stop in args.stop]
    SamplingParams(**given)  # refuses numbers before a model is loaded
    check_options(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda needs a CUDA GPU that torch can use, and there is none here"
        )
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    from llamatelemetry.inference.engine import InferenceEngine
    from llamatelemetry.loading.find import load_model

    _quiet_transformers()
    with _progress_bar("loading") as progress:
        loaded = load_model(args.model, device=device, exact=args.exact, progress=progress)
    speculation = speculation_of(args, loaded.tokenizer, device, args.exact)
    kept = {"cache_dtype": cache_dtype_of(args)}
    with refusals_name_the_option():
        engine = InferenceEngine(loaded, backend=args.backend, **kept)
    params = replace(engine.defaults.unasked(), **given)
    drafts: list[tuple[str, str]] = []
    if speculation is None:
        for piece in engine.stream(prompt, params, args.max_tokens, stops, system_prompt=system):
            emit(piece)
        stats = engine.stats
    else:
        asked = params, args.max_tokens, stops
        ids = engine.encode(prompt, system)
        stats, drafts = _speculate(engine, ids, *asked, kept | {"speculation": speculation})
    emit("\n")
    rows = [*_rows(stats), *drafts, _peak_memory()]
    print(" · ".join(f"{name} {value}" for name, value in rows), file=sys.stderr)
    if args.compare:
        ids = engine.encode(prompt, system)
        plain = _plain_transformers(args, ids, stats.generated_tokens, device)
        print(f"{'':18}{'llamatelemetry':>18}{'transformers':>18}", file=sys.stderr)
        for (name, ours), (_, theirs) in zip(_rows(stats), _rows(plain), strict=True):
            print(f"{name:18}{ours:>18}{theirs:>18}", file=sys.stderr)
    return 0


def _speculate(
    engine: Any,
    prompt: list[int],
    params: Any,
    max_tokens: int,
    stops: list[str],
    options: dict[str, Any],
) -> tuple[Any, list[tuple[str, str]]]:
    """Emits the text of a batch of one with drafts; GenerationStats, and a row about drafts."""
    from llamatelemetry.inference.continuous import ContinuousBatching
    from llamatelemetry.inference.engine import GenerationStats

    batcher = ContinuousBatching(1, engine, **options)
    handle = batcher.submit(prompt, params, max_tokens, stop_sequences=stops)
    for piece in handle:
        emit(piece)
    found = handle.stats
    stats = GenerationStats(
        len(prompt),
        found.num_tokens,
        found.first_token - found.enqueued,
        found.last_token - found.first_token,
    )
    right = f"{found.accepted_tokens} of {found.drafted_tokens} right"
    return stats, [("drafted tokens", right)]


def _rows(stats: Any) -> list[tuple[str, str]]:
    """What a GenerationStats says, as label and value."""
    speed = f"{stats.decode_tokens_per_s:.1f} tok/s" if stats.generated_tokens > 1 else "none"
    return [
        ("prompt", _tokens(stats.prompt_tokens)),
        ("generated", _tokens(stats.generated_tokens)),
        ("first token", f"{stats.first_token_s:.3f} s"),
        ("prompt speed", f"{stats.prompt_tokens_per_s:.0f} tok/s"),
        ("generation speed", speed),
    ]


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _peak_memory() -> tuple[str, str]:
    import torch

    if torch.cuda.is_initialized():
        return "peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "peak memory", f"{peak_kib / 2**10:.0f} MiB"


def _plain_transformers(
    args: argparse.Namespace, prompt: list[int], count: int, device: str
) -> Any:
    """GenerationStats of transformers' generate: same weights, dense in bfloat16, same prompt."""
    import torch

    from llamatelemetry.inference.engine import GenerationStats
    from llamatelemetry.loading.dense import load_dense

    model = load_dense(args.model, device=device, dtype=torch.bfloat16)
    ids = torch.tensor([prompt], device=device)
    times: list[float] = []

    class _Clock:
        def put(self, _: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None: ...

    options = {"do_sample": False, "max_new_tokens": count}
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
