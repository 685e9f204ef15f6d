"""python -m llamatelemetry doctor: what this machine and this build can do, and why not more.

It answers where nothing else does: without a library that loads, and without torch.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from llamatelemetry import machine
from llamatelemetry._native import coverage, library
from llamatelemetry.cli.output import writing


def why_no_cuda() -> str | None:
    """Why no CUDA kernel can run here, or None when one can."""
    if library.why_no_library():
        return "no op runs here"
    import torch

    if not torch.cuda.is_available():
        return library.why_no_cuda_library() or library.why_old_driver() or "torch finds no GPU"
    return coverage.why_no_build(torch.cuda.current_device())


def backend() -> tuple[str, str | None]:
    """What patch and the engine compute with on this machine's GPU, or its CPU, and why."""
    if library.why_no_library():
        return "none", "no op runs here"
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return coverage.backend_for(torch.device(kind))


def cuda_kernel(op: str) -> str:
    """What serves op on the current GPU: code of ours, "triton" and what of the op where that is
    not all of it, or "none: " and the reason."""
    import torch

    from llamatelemetry._native import kernels
    from llamatelemetry.ops import backends

    if op in coverage.TRITON_OPS and backend()[0] == "triton":
        return "triton" + (f": {part}" if (part := coverage.TRITON_OPS[op]) else "")
    if reason := why_no_cuda() or kernels.without_cuda.get(op):
        return f"none: {reason.partition(';')[0]}"
    if op in backends.ATTENTION_OPS:
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        choices = (f"{str(dtype)[6:]}: {backends.attention_choice(op, dtype)}" for dtype in dtypes)
        return "; ".join(choices)
    capability = machine.gpus()[torch.cuda.current_device()]["capability"]
    return str(coverage.cuda_code(capability, coverage.cuda_archs()))


def cpu_kernel(op: str) -> str:
    """The level of the CPU kernel of op, or "none"."""
    from llamatelemetry._native import kernels

    return library.cpu_isa() if kernels.has_kernel(op, "CPU") else "none"


def op_kernels() -> dict[str, dict[str, str]]:
    """What serves each op on either device; needs the ops."""
    from llamatelemetry._native import kernels

    return {op: {"cpu": cpu_kernel(op), "cuda": cuda_kernel(op)} for op in kernels.op_names()}


def report() -> dict[str, Any]:
    """The machine, the build, and the kernel of each op, ready for JSON."""
    why_not = library.why_no_library()
    loaded = {"cpu": why_not is None, "cuda": why_not is None and not library.why_no_cuda_library()}
    return {
        "machine": machine.describe(),
        "build": {
            "problem": why_not,
            "libraries": {
                name: str(library.library_path(name)) if loaded[name] else None for name in loaded
            },
            "cuda_archs": coverage.cuda_archs(),
            "cuda_version": library.build_info("CUDA_VERSION", None),
            "cpu_levels": library.build_info("CPU_ISA_LEVELS", []),
            "cpu_level": None if why_not else library.cpu_isa(),
            "backend": dict(zip(("name", "why"), backend(), strict=True)),
        },
        "ops": {} if why_not else op_kernels(),
    }


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The report but for its ops, as lines to read."""
    computer, build = found["machine"], found["build"]
    gpus = [f"{g['name']}, compute {g['capability']}, {g['memory']}" for g in computer["gpus"]]
    problem = [("problem", f"no op runs here: {build['problem']}")] if build["problem"] else []
    levels = ", ".join(build["cpu_levels"]) or "an unknown build"
    return [
        *problem,
        ("CPU", f"{computer['cpu']}, {computer['threads']} threads"),
        ("CPU level", f"{build['cpu_level'] or 'none'} of {levels}"),
        ("GPU", "; ".join(gpus) or f"none: {why_no_cuda()}"),
        ("driver", computer["driver"] or "none"),
        ("CUDA of torch", computer["cuda"] or "none"),
        ("CUDA archs built", ", ".join(build["cuda_archs"]) or "none"),
        ("backend", ": ".join(filter(None, build["backend"].values()))),
        *computer["versions"].items(),
        *((f"{name} library", path or "not loaded") for name, path in build["libraries"].items()),
    ]


def print_plain(found: dict[str, Any]) -> None:
    for name, value in facts(found):
        print(f"{name:<18} {value}")
    if found["ops"]:
        print(f"\n{'op':<24} {'cpu':<24} cuda")
    for op, kernel in found["ops"].items():
        print(f"{op:<24} {kernel['cpu']:<24} {kernel['cuda']}")


def print_rich(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    machine_table = Table("", "", show_header=False, box=None)
    for name, value in facts(found):
        machine_table.add_row(f"[bold]{name}", escape(value))
    ops_table = Table("op", "cpu", "cuda", box=SIMPLE_HEAD)
    for op, kernel in found["ops"].items():
        cells = (f"[dim]{k}" if k.startswith("none") else f"[green]{k}" for k in kernel.values())
        ops_table.add_row(op, *cells)
    console = Console()
    console.print(machine_table, *([ops_table] if found["ops"] else []))


def run(arguments: argparse.Namespace) -> int:
    """Exit code: 0, or 1 where no op can run; the report says why."""
    found = report()
    with writing():
        if arguments.json:
            print(json.dumps(found, indent=2))
        else:
            try:
                print_rich(found)
            except ModuleNotFoundError:
                print_plain(found)  # rich comes with the extra [hf]
    return 1 if found["build"]["problem"] else 0


def add_command(commands: Any) -> None:
    """Adds the subcommand doctor to argparse's subparsers."""
    parser = commands.add_parser("doctor", help="what this machine and this build can do")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
