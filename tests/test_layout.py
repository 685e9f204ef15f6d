"""The tree holds to its design: which way includes point, what stands where, how long it is.

Each test gathers its offenders, so that one run names them all.
"""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest

from llamatelemetry import ops

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ROOMS = ("attention", "cache", "gemm", "norm", "quant", "sampling")
# What each folder of csrc may include, besides itself. Rooms never include each other.
MAY_INCLUDE = {
    "schema": {"binding"},
    "facts": {"common", "cpu", "format", "attention"},
    "common": set(),
    "binding": {"common", "cpu"},
    "cpu": {"common", "binding"},
    "ptx": {"common"},
    "tile": {"common", "ptx"},
    "vec": {"common", "cpu"},
    "format": {"common", "binding", "tile", "vec"},
    **{room: {"common", "binding", "cpu", "ptx", "tile", "vec", "format"} for room in ROOMS},
}
# Files over their budget: the most lines they may have, and why.
LONGER: dict[str, tuple[int, str]] = {
    "tests/test_sanitizer_cases.py": (
        309,
        "a small case for each of more than 30 ops, in one list",
    ),
}

CPP = sorted(p for suffix in ("cpp", "h", "cu", "cuh") for p in CSRC.rglob(f"*.{suffix}"))
PACKAGE = sorted(ROOT.glob("llamatelemetry/**/*.py"))
BENCHMARKS = sorted(ROOT.glob("benchmarks/*.py"))
BUILD = [ROOT / "setup.py", *sorted(ROOT.glob("build_tools/*.py"))]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
PYTHON = [*BUILD, *PACKAGE, *BENCHMARKS, *NOTEBOOKS, *TESTS]
OF_TRANSFORMERS = {"modeling_*.py"}  # files that documents name and this tree has not
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def folder_of(include: str) -> str:
    """norm for norm/params.h; schema for schema.cpp."""
    return include.partition("/")[0].partition(".")[0]


@cache
def includes_of(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE))


def all_includes_of(path: Path) -> set[str]:
    """With those of the files it includes, and so on."""
    seen: set[str] = set()
    waiting = [path]
    while waiting:
        new = set(includes_of(waiting.pop())) - seen
        seen |= new
        waiting += [CSRC / include for include in new if (CSRC / include).exists()]
    return seen


def test_includes_point_one_way():
    offenders = []
    for path in CPP:
        here = folder_of(path.relative_to(CSRC).as_posix())
        ours = {folder_of(i) for i in includes_of(path) if (CSRC / i).exists()}
        offenders += [(name_of(path), there) for there in ours - {here} - MAY_INCLUDE[here]]
    assert offenders == []


def test_kernels_know_nothing_of_torch():
    kernels = [p for p in CPP if p.suffix in (".cu", ".cuh") or p.name.endswith("_cpu.cpp")]
    assert kernels
    assert [
        (name_of(path), include)
        for path in kernels
        for include in all_includes_of(path)
        if include.startswith(("torch/", "ATen/", "c10/", "binding/stable.h"))
    ] == []


def test_ptx_stands_in_its_own_place():
    elsewhere = (p for p in CPP if folder_of(p.relative_to(CSRC).as_posix()) != "ptx")
    assert [name_of(p) for p in elsewhere if re.search(r"\basm\b", p.read_text())] == []


def schemas() -> list[tuple[str, str, bool]]:
    """(room, op, whether it returns tensors) for every line of csrc/schema.cpp."""
    found, room = [], ""
    for line in (CSRC / "schema.cpp").read_text().splitlines():
        if match := re.match(r"\s*// (\w+):", line):
            room = match[1]
        if match := re.match(r'\s*m\.def\("(\w+)\(.*-> (.*)"\);', line):
            found.append((room, match[1], match[2] != "()"))
    return found


@pytest.mark.parametrize(("room", "op", "returns"), schemas(), ids=[op for _, op, _ in schemas()])
def test_every_op_is_whole(room, op, returns):
    """A kernel, a wrapper that documents it, a fake if it returns tensors, and the tests."""
    assert op in ops.__all__
    assert room in ROOMS
    checks = "".join(path.read_text() for path in (CSRC / room).glob("**/ops*.cpp"))
    assert f'm.impl("{op}"' in checks
    wrapper = getattr(ops, op)
    assert re.fullmatch(rf"llamatelemetry\.ops\.{room}(_\w+)?", wrapper.__module__)
    assert "Raises:" in wrapper.__doc__
    assert "Returns:" in wrapper.__doc__ or not returns
    fakes = "".join(p.read_text() for p in (ROOT / "llamatelemetry" / "ops").glob(f"{room}*.py"))
    assert f'register_fake("{op}")' in fakes or not returns
    tests = [p.read_text() for p in (ROOT / "tests" / room).glob("test_*.py")]
    helpers = ("assert_refuses(", "run_opcheck(", "assert_replays(", "assert_compiles(")
    assert any(f'"{op}"' in text and all(helper in text for helper in helpers) for text in tests)


def budget(path: Path) -> int:
    if path.name == "setup.py":
        return 149
    if path in DOCUMENTS:
        return 199
    if path.suffix == ".py":
        return 300
    return 400 if path.match("ops*.cpp") else 600


def test_file_budgets():
    lines = {p: len(p.read_text().splitlines()) for p in [*CPP, *PYTHON, *DOCUMENTS]}
    over = {name_of(path): count for path, count in lines.items() if count > budget(path)}
    assert {name: n for name, n in over.items() if n > LONGER.get(name, (0, ""))[0]} == {}
    assert LONGER.keys() <= over.keys(), "an exception that nothing needs"


def test_function_budget():
    assert [
        f"{name_of(path)}: {node.name}"
        for path in (*PACKAGE, *BENCHMARKS, *NOTEBOOKS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80
    ] == []


def test_rooms_of_ops_import_only_what_is_below():
    imports = re.compile(r"^(?:from|import) (llamatelemetry[\w.]*)", re.MULTILINE)
    assert [
        (name_of(path), module)
        for path in PACKAGE
        if path.parent.name == "ops" and path.stem.partition("_")[0] in ROOMS
        for module in imports.findall(path.read_text())
        if not re.fullmatch(r"llamatelemetry\.ops\.(_\w+|backends|formats)", module)
    ] == []


def test_only_the_harness_times():
    timer = re.compile(r"perf_counter|monotonic|time\.time\(|timeit|cuda\.Event")
    assert [name_of(p) for p in BENCHMARKS if timer.search(p.read_text())] == [
        "benchmarks/harness.py"
    ]


@cache
def tree() -> tuple[Path, ...]:
    """What stands in the tree, without environments, builds and other folders that tools make."""
    made = {"build", "dist", "__pycache__"}
    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in made
            and not name.endswith(".egg-info")
            and (name[0] != "." or name in (".ci", ".github"))
        ]
        found += [Path(folder, name) for name in (*folders, *files)]
    return tuple(found)


def test_files_of_tests_have_names_of_their_own():
    """pytest takes two of one name for one module."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_tree_is_free_of_what_tools_make():
    assert ROOT / "setup.py" in tree()
    assert not [p for p in tree() if {".venv", "build"} & set(p.relative_to(ROOT).parts)]


def test_documents_name_what_exists():
    quoted = [
        (path.name, name)
        for path in DOCUMENTS
        for name in re.findall(r"`([\w.*/-]+)`", path.read_text())
        if "/" in name or name.endswith((".py", ".h", ".cpp", ".cuh", ".md", ".toml"))
    ]
    assert [
        (where, name)
        for where, name in quoted
        if name not in OF_TRANSFORMERS
        and not name.startswith("build/")  # what a build makes
        and not any(path.match(name) for path in tree())
    ] == []


def named_folders(text: str) -> set[str]:
    """Every path in a document; csrc/attention/{mma,cpu} is two."""
    found = set(re.findall(r"[\w./]+", text))
    for stem, tails in re.findall(r"([\w./]+/)\{([\w,]+)\}", text):
        found |= {stem + tail for tail in tails.split(",")}
    return {name.rstrip("/.") for name in found}


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_the_map_names_every_folder(document):
    folders = {name_of(path.parent) for path in [*CPP, *PACKAGE]}
    assert folders - named_folders((ROOT / document).read_text()) == set()


def test_no_machine_paths():
    machine = re.compile(r"(?<![\w.*])/(home|root|Users|work)/")
    results = ROOT.glob("benchmarks/results/*.json")
    notes = [*ROOT.glob("benchmarks/notes/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    names = ("Makefile", "pyproject.toml", "CHANGELOG.md", "SECURITY.md")
    texts = [*CPP, *PYTHON, *DOCUMENTS, *results, *notes, *(ROOT / name for name in names)]
    assert [name_of(p) for p in texts if machine.search(p.read_text())] == []
