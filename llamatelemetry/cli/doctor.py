"""python -m llamatelemetry doctor: what this machine and this build can do, and why not more."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from llamatelemetry import _build_info, machine
from llamatelemetry._native import kernels, library
from llamatelemetry.ops.backends import flash_choice


def cuda_code(capability: str, archs: list[str]) -> str | None:
    """What of archs runs on a GPU of capability, e.g. sm_80 on 8.6; None when nothing does."""
    major, minor = map(int, capability.split("."))
    built = [(int(a.split(".")[0]), int(a.removesuffix("+PTX").split(".")[1])) for a in archs]
    native = [arch for arch in built if arch[0] == major and arch[1] <= minor]
    if native:
        return "sm_{}{}".format(*max(native))
    ptx = [arch for arch, text in zip(built, archs, strict=True) if text.endswith("+PTX")]
    usable = [arch for arch in ptx if arch <= (major, minor)]
    return "PTX {}.{}, compiled by the driver at first use".format(*max(usable)) if usable else None


def why_no_cuda() -> str | None:
    """Why no CUDA kernel can run here, or None when one can."""
    if reason := library.why_no_cuda_library():
        return reason
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = machine.gpus()[torch.cuda.current_device()]["capability"]
    if cuda_code(capability, _build_info.CUDA_ARCHS) is None:
        archs = ", ".join(_build_info.CUDA_ARCHS)
        return f"the GPU has compute capability {capability}, this build holds {archs}"
    return None


def cuda_kernel(op: str) -> str:
    """What serves op on the current GPU, or "none: " and the reason."""
    if reason := why_no_cuda() or kernels.without_cuda.get(op):
        return f"none: {reason.partition(';')[0]}"
    if op.startswith("flash_attn"):
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        return ", ".join(f"{str(dtype)[6:]} {flash_choice(dtype)}" for dtype in dtypes)
    capability = machine.gpus()[torch.cuda.current_device()]["capability"]
    return str(cuda_code(capability, _build_info.CUDA_ARCHS))


def cpu_kernel(op: str) -> str:
    return library.cpu_isa() if kernels.has_kernel(op, "CPU") else "none"


def report() -> dict[str, Any]:
    """The machine, the build, and the kernel of each op, ready for JSON."""
    return {
        "machine": machine.describe(),
        "build": {
            "libraries": {
                name: str(library.library_path(name)) if loaded else None
                for name, loaded in (("cpu", True), ("cuda", not library.why_no_cuda_library()))
            },
            "cuda_archs": _build_info.CUDA_ARCHS,
            "cpu_levels": _build_info.CPU_ISA_LEVELS,
            "cpu_level": library.cpu_isa(),
        },
        "ops": {op: {"cpu": cpu_kernel(op), "cuda": cuda_kernel(op)} for op in kernels.op_names()},
    }


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The report but for its ops, as lines to read."""
    computer, build = found["machine"], found["build"]
    gpus = [f"{g['name']}, compute {g['capability']}, {g['memory']}" for g in computer["gpus"]]
    return [
        ("CPU", f"{computer['cpu']}, {computer['threads']} threads"),
        ("CPU level", f"{build['cpu_level']} of {', '.join(build['cpu_levels'])}"),
        ("GPU", "; ".join(gpus) or f"none: {why_no_cuda()}"),
        ("driver", computer["driver"] or "none"),
        ("CUDA of torch", computer["cuda"] or "none"),
        ("CUDA archs built", ", ".join(build["cuda_archs"]) or "none"),
        *computer["versions"].items(),
        *((f"{name} library", path or "not loaded") for name, path in build["libraries"].items()),
    ]


def print_plain(found: dict[str, Any]) -> None:
    for name, value in facts(found):
        print(f"{name:<18} {value}")
    print(f"\n{'op':<24} {'cpu':<24} cuda")
    for op, kernel in found["ops"].items():
        print(f"{op:<24} {kernel['cpu']:<24} {kernel['cuda']}")


def print_rich(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    machine_table = Table("", "", show_header=False, box=None)
    for name, value in facts(found):
        machine_table.add_row(f"[bold]{name}", value)
    ops_table = Table("op", "cpu", "cuda", box=SIMPLE_HEAD)
    for op, kernel in found["ops"].items():
        cells = (f"[dim]{k}" if k.startswith("none") else f"[green]{k}" for k in kernel.values())
        ops_table.add_row(op, *cells)
    console = Console()
    console.print(machine_table, ops_table)


def run(arguments: argparse.Namespace) -> int:
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    try:
        print_rich(found)
    except ModuleNotFoundError:
        print_plain(found)  # rich comes with the extra [hf]
    return 0


def add_command(commands: Any) -> None:
    """Adds the subcommand doctor to argparse's subparsers."""
    parser = commands.add_parser("doctor", help="what this machine and this build can do")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
