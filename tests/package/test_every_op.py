"""Each step of docs/adding_an_op.md is done for every op of csrc/schema.cpp, on each backend.

A launcher without its kernel file links all the same and fails where the library loads: here it
fails by name, and needs no build to do so.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
OPS = re.findall(r'^\s*m\.def\("(\w+)\(', (CSRC / "schema.cpp").read_text(), re.MULTILINE)

# Launchers that ops call on one backend alone, and why.
ONE_BACKEND = {
    "launch_dense_weights": (
        "cuda",
        "many rows go through torch's matmul, which the CPU never wants",
    ),
    "launch_quantize_made_rows": ("cuda", "the CPU makes the rows by the ops they are named after"),
}
# Ops without a function of their own in ops/reference*, and why.
NO_REFERENCE = {"unpack": "it undoes repack, so its test is the way there and back"}


def texts(*patterns: str) -> dict[Path, str]:
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    assert paths, patterns
    return {path: path.read_text() for path in paths}


@cache
def checks_of_ops() -> dict[str, str]:
    """Each top-level function of the ops*.cpp, by name, and its text."""
    functions: dict[str, str] = {}
    for text in texts("csrc/*/**/ops*.cpp").values():
        # A definition starts a line, and its body ends with the next brace that does.
        for match in re.finditer(r"^[\w:<>,&* ]+?\b(\w+)\([^;{}]*\) \{\n.*?^\}", text, re.M | re.S):
            functions[match[1]] = match[0]
    return functions


def implementation(op: str) -> str:
    """The C++ function that m.impl registers for op."""
    registered = [
        match[1]
        for text in texts("csrc/*/**/ops*.cpp").values()
        for match in re.finditer(rf'm\.impl\("{op}", TORCH_BOX\(&(\w+)\)\)', text)
    ]
    assert len(registered) == 1, f"{op}: m.impl must stand in one ops*.cpp, is in {registered}"
    return registered[0]


def launchers_of(op: str) -> set[str]:
    """Every launch_<name> that the op's function names, and those that it calls in turn."""
    functions, seen, waiting = checks_of_ops(), set(), [implementation(op)]
    while waiting:
        name = waiting.pop()
        if name in functions and name not in seen:
            seen.add(name)
            waiting += re.findall(r"\b\w+\b", functions[name])
    return {name for f in seen for name in re.findall(r"\blaunch_\w+", functions[f])}


@cache
def defined(backend: str) -> set[str]:
    """The launchers that the kernel files of a backend define in namespace llamatelemetry."""
    if backend == "cpu":
        found = texts("csrc/*/**/*_cpu.cpp").values()
        made = r"^LT_CPU_LAUNCHER\w*\((launch_\w+),"  # for all levels, csrc/cpu/isa.h
    else:
        found = texts("csrc/*/**/*.cu").values()
        made = r"^Error (launch_\w+)\([^;{}]*\) \{"
    return {name for text in found for name in re.findall(made, text, re.MULTILINE)}


def names_used(text: str) -> set[str]:
    """Names, attributes and strings of a Python file; comments and docstrings are none of them."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {node.value for node in nodes if isinstance(node, ast.Constant)}


def test_every_schema_has_a_line_here():
    assert len(OPS) == len(set(OPS)) == (CSRC / "schema.cpp").read_text().count("m.def(")


@pytest.mark.parametrize("op", OPS)
def test_kernels(op):
    launchers = launchers_of(op)
    assert launchers, f"{op} launches nothing"
    assert [
        f"{launcher} has no definition for {backend}"
        for launcher in sorted(launchers)
        for backend in ("cpu", "cuda")
        if ONE_BACKEND.get(launcher, (backend,))[0] == backend and launcher not in defined(backend)
    ] == []


def test_what_kernel_files_declare_they_define():
    """Launchers of one backend that other files of it call: none may be left without a body."""
    declared = {
        name
        for path, text in texts("csrc/*/**/*.h", "csrc/*/**/*.cuh").items()
        if "vec" not in path.parts and "cpu" not in path.parts
        for name in re.findall(r"^Error (launch_\w+)\([^;{}]*\);", text, re.MULTILINE)
    }
    assert declared - defined("cpu") - defined("cuda") == set()


@pytest.mark.parametrize("op", OPS)
def test_reference(op):
    oracles = texts("llamatelemetry/ops/reference*.py", "llamatelemetry/ops/**/reference*/*.py")
    has_one = any(re.search(rf"^def {op}\(", text, re.MULTILINE) for text in oracles.values())
    assert has_one != (op in NO_REFERENCE)


@pytest.mark.parametrize("op", OPS)
def test_benchmark_row(op):
    assert any(op in names_used(text) for text in texts("benchmarks/bench_*.py").values())


@pytest.mark.parametrize("op", OPS)
def test_small_case_for_the_sanitizer(op):
    cases = (ROOT / "tests" / "test_sanitizer_cases.py").read_text()
    assert re.search(rf"\bops\.{op}\b", cases)


def test_exceptions_are_needed():
    assert ONE_BACKEND.keys() <= {name for op in OPS for name in launchers_of(op)}
    assert NO_REFERENCE.keys() <= set(OPS)
