"""The built libraries stand on what torch 2.10 and a Linux of 2022 have, and on no more."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from llamatelemetry._native.library import library_path

LIBRARIES = [path for path in map(library_path, ("cpu", "cuda")) if path.exists()]
FLOOR = (2, 10)
NEEDED = {
    "cpu": {"libtorch_cpu.so"},
    "cuda": {"libtorch_cpu.so", "libtorch_cuda.so"},
}
SYSTEM = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
SYSTEM |= {"libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-aarch64.so.1"}
# Debian 12, Ubuntu 22.04 and RHEL 9 are the oldest systems that torch 2.10's Python 3.10+ and
# CUDA 13 are used on; glibc 2.34 is RHEL 9's, libstdc++ 3.4.30 is that of gcc 12.
CEILINGS = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30)}


def run(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def undefined_symbols(library: Path) -> list[str]:
    return [line.split()[-1] for line in run("nm", "-D", "-u", library).splitlines()]


@cache
def shim_versions() -> dict[str, tuple[int, int]]:
    """Each stable shim of the installed headers and the torch version that its #if guard names."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    versions: dict[str, tuple[int, int]] = {}
    for header in [
        include / "stable" / "c" / "shim.h",
        *sorted((include / "inductor" / "aoti_torch" / "c").glob("*.h")),
        *sorted((include / "inductor" / "aoti_torch" / "generated").glob("*.h")),
    ]:
        guards: list[tuple[int, int]] = []
        for line in header.read_text().splitlines():
            if line.startswith("#if"):
                match = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line)
                guards.append((int(match[1]), int(match[2])) if match else (0, 0))
            elif line.startswith("#endif"):
                guards.pop()
            else:
                for name in re.findall(r"\b((?:aoti_)?torch_\w+)\(", line):
                    versions.setdefault(name, max(guards, default=(0, 0)))
    return versions


@pytest.fixture(params=LIBRARIES, ids=lambda path: path.stem.rpartition("_")[2])
def library(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_only_shims_of_the_floor(library):
    shims = {name for name in undefined_symbols(library) if re.match(r"(aoti_)?torch_", name)}
    assert shims, "the library uses no torch at all"
    versions = shim_versions()
    assert shims <= versions.keys(), "not a stable shim"
    assert not {name: versions[name] for name in shims if versions[name] > FLOOR}


def test_guards_are_found():
    versions = shim_versions()
    assert versions["torch_call_dispatcher"] == (2, 10)
    assert versions["torch_from_blob"] > FLOOR
    assert versions["aoti_torch_get_dim"] == (0, 0)


def test_no_cpp_of_torch_and_no_python(library):
    forbidden = re.compile(r"_ZNK?(2at|3c10|5torch)|Py[A-Z_]|_Py|cuda|cu[A-Z]|omp_|GOMP_")
    allowed = {"aoti_torch_get_current_cuda_stream", "aoti_torch_device_type_cuda"}
    names = {name for name in undefined_symbols(library) if forbidden.match(name)}
    assert not names - allowed


def test_nothing_of_ours_is_undefined(library):
    """A launcher that no file defines links all the same; nothing then loads, on GPU machines."""
    demangled = run("nm", "-D", "-u", "-C", library).splitlines()
    assert not [line for line in demangled if "llamatelemetry::" in line]


def test_needed_libraries(library):
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", library)))
    torch_libraries = NEEDED[library.stem.rpartition("_")[2]]
    assert torch_libraries <= needed <= torch_libraries | SYSTEM


def test_system_ceilings(library):
    for name in undefined_symbols(library):
        base, _, version = name.partition("@")
        family, _, number = version.rpartition("_")
        if family in CEILINGS:
            assert tuple(map(int, number.split("."))) <= CEILINGS[family], base


def test_exports_nothing_of_cpp(library):
    """A C++ symbol of ours or of torch's headers could be taken for another library's."""
    exported = run("nm", "-D", "-C", "--defined-only", library).splitlines()
    assert any(" lt_" in line for line in exported)
    assert not [line for line in exported if re.search("llamatelemetry::|torch::|c10::", line)]
