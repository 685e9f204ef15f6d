"""No object holds wider instructions than the level it is compiled for may use."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from llamatelemetry._build_info import CPU_ISA_LEVELS

OBJECTS = Path(__file__).resolve().parents[2] / "build" / "ninja" / "cpu"
FORBIDDEN = {  # %tmm, AMX's, beside each: it assembles without flags
    "host": r"%[tyz]mm|%xmm(1[6-9]|2\d|3[01])|%k[0-7]",
    "scalar": r"%[tyz]mm|%xmm(1[6-9]|2\d|3[01])|%k[0-7]|\tv[a-z]",
    "avx2": r"%[tz]mm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]",
    "avx512": r"\tv(dpbf16|cvtne)|%tmm",
    "avx512bf16": r"%tmm",
}

pytestmark = pytest.mark.skipif(
    "avx2" not in CPU_ISA_LEVELS or not (OBJECTS.exists() or os.environ.get("CI")),
    reason=f"no objects in {OBJECTS}: not built here, or not for x86-64",
)


def disassembly(path: Path) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("level", FORBIDDEN)
def test_no_wider_instruction(level):
    objects = sorted(OBJECTS.rglob(f"*.{level}.o"))
    assert objects
    for path in objects:
        found = re.search(rf".*(?:{FORBIDDEN[level]}).*", disassembly(path))
        assert found is None, f"{path.name}: {found and found[0]}"


@pytest.mark.parametrize(
    ("lower", "wider"),
    [
        ("avx2", "norm/rms_norm_cpu.cpp.avx512.o"),
        ("avx512", "attention/cpu/flash_cpu.cpp.avx512bf16.o"),
        ("avx512bf16", "attention/cpu/flash_cpu.cpp.amx.o"),
        ("avx512bf16", "attention/cpu/paged_cpu.cpp.amx.o"),
    ],
)
def test_the_pattern_finds_them(lower, wider):
    assert re.search(FORBIDDEN[lower], disassembly(OBJECTS / wider))


def test_no_inline_function_with_linkage():
    """A weak definition in an AVX-512 object may be the one the linker keeps for every level."""
    for path in sorted(OBJECTS.rglob("*_cpu.cpp.a*.o")):
        command = ["nm", "-C", "--defined-only", str(path)]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if line.split()[1] in "WVu"]
        assert not weak, f"{path.name}: {weak}"
