"""What a build promises, read from what it made: spills, instantiations, seconds, length.

The first three look into build/ninja and skip where nothing was built there; cuobjdump comes with
CUDA. Every exception has a reason, and none may stand that nothing needs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from llamatelemetry._build_info import CUDA_ARCHS, CUDA_VERSION

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILT = ROOT / "build" / "ninja"

TABLES_CUDA = "13.0"  # whose nvcc the tables are of: which of them are needed is another's affair
# Bytes of stack that a kernel of a file may use, on the architecture where it uses most.
SHORTER = "shorter blocks that do not spill measure worse: benchmarks/notes/attention.md"
UNKNOWN = "small, and not looked into yet"
STACK: dict[str, tuple[int, str]] = {
    "attention/**/*64_sm90.cu": (168, SHORTER),
    "attention/**/*96_sm90.cu": (80, SHORTER),
    "attention/**/*128_sm90.cu": (80, SHORTER),
    "attention/**/*192_sm90.cu": (16, SHORTER),
    "attention/**/*256_sm90.cu": (40, SHORTER),
    "attention/decode/decode.cu": (
        88,
        "sm_80, head_dim 192 and 256: not looked into yet; 24 on sm_90 at 256, outside the loop "
        "over keys, whose accumulators take 128 registers",
    ),
    "attention/decode/decode_sm75.cu": (
        288,
        "most at head_dim 192; up to 128 columns none of it in the loop over keys on sm_75, beyond "
        "that what stays the same from key to key: 64 loads of 1525 instructions",
    ),
    "attention/decode/decode_*.cu": (
        200,
        "sm_80, most at head_dim 192 and 256, not looked into yet; 16 on sm_90, outside the loop",
    ),
    "attention/**/*paged*.cu": (
        48,
        "the lookup of pages: a kernel of its own, apart from dense keys",
    ),
    "attention/**/*sm75.cu": (16, UNKNOWN),
    "attention/**/*simt.cu": (8, UNKNOWN),
    "cache/slots.cu": (8, UNKNOWN),
    "gemm/product/few_rows.cu": (8, UNKNOWN),
    "gemm/product/mma.cu": (32, UNKNOWN),
    "gemm/product/product.cu": (8, UNKNOWN),
    "gemm/quant_linear_low_bit.cu": (
        16,
        "Q3_K on sm_75 and sm_80: scales of four parts of four rows, outside the loop over x",
    ),
    "gemm/quant_stream_[bf]*16.cu": (
        8,
        "Q4_K on sm_90, 9 to 16 rows of x: 16 warps have 128 registers each, and a word that is "
        "written once is read in the loop",
    ),
    "sampling/sample.cu": (64, UNKNOWN),
}
MOST_INSTANTIATIONS = 24  # of kernels, in a file and for an architecture
INSTANTIATIONS: dict[str, tuple[int, str]] = {
    "gemm/quant_wgmma_*_sm90.cu": (
        32,
        "8 formats, or 6 of which 2 have another kernel for long groups; 2 dtypes; 2 shapes of "
        "blocks. The headers would be compiled once more for each half",
    ),
    "norm/activation.cu": (30, "five activations; a few lines each"),
}
MOST_LINES = 80
LINES: dict[str, tuple[int, str]] = {}
# A file takes 15 s of a core of its own in a quiet minute; builds share cores, and nvcc compiles
# a *.cu once for each architecture. What takes twenty times as long is a mistake.
MOST_SECONDS = 300


def resource_usage(cuobjdump: str, compiled: Path) -> dict[str, list[int]]:
    """Architecture -> the bytes of stack of each kernel in one object file."""
    command = [cuobjdump, "--dump-resource-usage", str(compiled)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stacks: dict[str, list[int]] = {}
    arch = ""
    for line in done.stdout.splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        if match := re.search(r"REG:\d+ STACK:(\d+)", line):
            stacks.setdefault(arch, []).append(int(match[1]))
    return stacks


@cache
def kernels() -> dict[str, dict[str, list[int]]]:
    """Source, as norm/rms_norm.cu -> what cuobjdump says of its object."""
    cuda = f"{Path(os.environ.get('NVCC') or 'nvcc').parent}:/usr/local/cuda/bin"
    cuobjdump = shutil.which("cuobjdump", path=f"{os.environ['PATH']}:{cuda}")
    sources = [path.relative_to(CSRC).as_posix() for path in sorted(CSRC.rglob("*.cu"))]
    objects = {source: BUILT / "cuda" / f"{source}.device.o" for source in sources}
    objects = {source: path for source, path in objects.items() if path.exists()}
    if not cuobjdump or not objects:
        pytest.skip(f"cuobjdump: {cuobjdump}, CUDA objects in {BUILT.name}: {len(objects)}")
    return {source: resource_usage(cuobjdump, path) for source, path in objects.items()}


def allowed(source: str, table: dict[str, tuple[int, str]], otherwise: int) -> int:
    """The limit of the first pattern that matches."""
    files = {
        pattern: {p.relative_to(CSRC).as_posix() for p in CSRC.glob(pattern)} for pattern in table
    }
    return next((table[pattern][0] for pattern in table if source in files[pattern]), otherwise)


def test_no_spills_but_those_listed():
    most = {source: max(map(max, found.values()), default=0) for source, found in kernels().items()}
    assert {s: n for s, n in most.items() if n > allowed(s, STACK, 0)} == {}


def test_instantiations():
    most = {source: max(map(len, found.values()), default=0) for source, found in kernels().items()}
    assert sum(most.values()) > 0
    limit = MOST_INSTANTIATIONS
    assert {s: n for s, n in most.items() if n > allowed(s, INSTANTIATIONS, limit)} == {}


@pytest.mark.parametrize(
    ("table", "otherwise"), [(STACK, 0), (INSTANTIATIONS, MOST_INSTANTIATIONS)]
)
def test_exceptions_are_needed(table, otherwise):
    """By a kernel for one of the architectures that the tables speak of."""
    found = kernels()
    if missing := {"7.5", "8.0", "9.0"} - {arch.removesuffix("+PTX") for arch in CUDA_ARCHS}:
        pytest.skip(f"not built for {sorted(missing)}")
    if CUDA_VERSION != TABLES_CUDA:
        pytest.skip(f"built by CUDA {CUDA_VERSION}, the tables are of {TABLES_CUDA}")
    count = max if table is STACK else len
    most = {source: max(map(count, of.values()), default=0) for source, of in found.items()}
    needed = {
        next(pattern for pattern in table if (CSRC / source) in CSRC.glob(pattern))
        for source, number in most.items()
        if number > otherwise
    }
    assert needed == table.keys()


@pytest.mark.parametrize("table", [STACK, INSTANTIATIONS, LINES])
def test_exceptions_match_a_file(table):
    for pattern, (_, reason) in table.items():
        assert reason
        assert list(CSRC.glob(pattern.partition(":")[0])), pattern


def code_of(text: str) -> str:
    """C++ without comments, strings, characters and preprocessor lines; lines stay lines."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r'R"\((.|\n)*?\)"|"(\\.|[^"\\\n])*"|\'(\\.|[^\'\\\n])+\'', blank, text)
    text = re.sub(r"//[^\n]*|/\*(.|\n)*?\*/", blank, text)
    return re.sub(r"^[ \t]*#(.*\\\n)*.*$", blank, text, flags=re.MULTILINE)


def functions(text: str) -> list[tuple[str, int]]:
    """(name, lines from the opening brace to the closing one) of each function of a C++ file."""
    code, found = code_of(text), []
    stack: list[tuple[str | None, int]] = []  # of open braces: a function's name, where it opened
    start = 0  # of the text that introduces the next brace
    for match in re.finditer(r"[{};]", code):
        at = match.start()
        before = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", code[start:at])
        if match[0] == "{":
            inside = any(name for name, _ in stack)
            scope = re.search(r"\b(namespace|struct|class|enum|union|extern)\b[^()]*$", before)
            call = re.search(r"(operator\S+|~?\w+)\s*\((?:.|\n)*\)", before)
            stack.append((call[1] if call and not scope and not inside else None, at))
        elif match[0] == "}" and stack:
            name, opened = stack.pop()
            if name:
                found.append((name, code.count("\n", opened, at) + 1))
        start = match.end()
    return found


def test_functions_are_found():
    text = """
    namespace a { // {
    struct S { int x = f({1, 2}); S() : x(1) {
      if (x) { g("}"); }
    } };
    template <int k> int named(int a,
        int b) {
      auto lambda = [&] { return '{'; };

      return lambda();
    } }
    """
    assert functions(text) == [("S", 3), ("named", 5)]


def test_function_length():
    sources = [p for p in sorted(CSRC.rglob("*")) if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    lengths = [
        (f"{path.relative_to(CSRC).as_posix()}: {name}", count)
        for path in sources
        for name, count in functions(path.read_text())
    ]
    assert len(lengths) > 300
    assert {n: c for n, c in lengths if c > LINES.get(n, (MOST_LINES, ""))[0]} == {}
    assert LINES.keys() <= {name for name, count in lengths if count > MOST_LINES}


def test_seconds_of_a_file():
    """Of the last build; what ccache made instant says nothing, and fails nothing."""
    log = BUILT / ".ninja_log"
    if not log.exists():
        pytest.skip("nothing was built here")
    seconds = {}
    for line in log.read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        if (BUILT / output).exists():
            seconds[output] = (int(end) - int(start)) / 1000
    assert {output: s for output, s in seconds.items() if s > MOST_SECONDS} == {}
