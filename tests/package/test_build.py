"""The build: arch lists, switches, the sdist, and a wheel built from it in a fresh environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build_file():
    spec = importlib.util.spec_from_file_location("ninja_file", ROOT / "build_tools" / "ninja.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", ["7.5", "8.0", "9.0+PTX"]),
        ("8.6", ["8.6"]),
        ("7.5;8.0+PTX", ["7.5", "8.0+PTX"]),
        (" 9.0, 10.0  12.0+PTX", ["9.0", "10.0", "12.0+PTX"]),
    ],
)
def test_arch_list(build_file, text, archs):
    assert build_file.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["7.0", "sm_80", "8", "8.0+ptx", "8.0;6.1", "9.0a", "8.0 PTX"])
def test_arch_list_refusals(build_file, text):
    with pytest.raises(SystemExit, match=r"LLAMATELEMETRY_CUDA_ARCHS must be >= 7.5") as caught:
        build_file.parse_archs(text)
    assert repr(text) in str(caught.value)


def test_arch_flags(build_file):
    archs = ["7.5", "9.0+PTX"]
    assert build_file.arch_flags("gemm.cu", archs).split() == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert build_file.arch_flags("gemm_sm90.cu", archs) == "-gencode=arch=compute_90a,code=sm_90a"
    assert build_file.arch_flags("gemm_sm90.cu", ["8.0"]) == ""


def test_cuda_switch(build_file, monkeypatch, tmp_path, capsys):
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for value, found in (("auto", True), ("1", True), ("0", False)):
        monkeypatch.setenv("LLAMATELEMETRY_CUDA", value)
        assert build_file.find_nvcc() == (str(tmp_path / "nvcc") if found else None)
    assert "CPU-only build" in capsys.readouterr().out
    monkeypatch.setenv("LLAMATELEMETRY_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        build_file.find_nvcc()


def test_no_nvcc(build_file, monkeypatch):
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(build_file.shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setenv("LLAMATELEMETRY_CUDA", "auto")
    assert build_file.find_nvcc() is None
    monkeypatch.setenv("LLAMATELEMETRY_CUDA", "1")
    with pytest.raises(SystemExit, match="needs nvcc on PATH or in NVCC"):
        build_file.find_nvcc()


def test_compilers(build_file, monkeypatch, tmp_path):
    """A compiler that is missing, too old, or none at all is refused before anything is built."""

    def compiler(prints: str) -> str:
        path = tmp_path / "c++"
        path.write_text(f"#!/bin/sh\necho '{prints}'\n")
        path.chmod(0o755)
        return str(path)

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"CXX must name a C\+\+ compiler, got 'no-such-compiler'"):
        build_file.find_cxx()
    for prints in ("#define __GNUC__ 11", "#define __clang_major__ 13", "hello"):
        monkeypatch.setenv("CXX", compiler(prints))
        with pytest.raises(SystemExit, match=r"CXX must be g\+\+ >= 12 or clang\+\+ >= 14, got"):
            build_file.find_cxx()
    monkeypatch.setenv("CXX", compiler("#define __GNUC__ 4\n#define __clang_major__ 14"))
    assert "maybe-uninitialized" not in build_file.find_cxx()[1]  # a warning of gcc's alone


SERIALISED = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to"


@pytest.mark.parametrize(
    ("prints", "status"),
    [
        ("ptxas info : fine", 0),
        ("ptxas info : (C7519) warpgroup.arrive is injected in around line 1 by compiler", 0),
        (f"ptxas info : (C7510) {SERIALISED} wgmma pipeline crossing function boundary", 1),
        (f"ptxas info : (C7512) {SERIALISED} insufficient register resources", 1),
        (f"ptxas info : (C7514) {SERIALISED} non wgmma instructions reading accumulators", 1),
    ],
)
def test_serialised_wgmma_stops_the_build(build_file, tmp_path, prints, status):
    """ptxas only notes it, with exit code 0."""
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho '{prints}'\n")
    (tmp_path / "nvcc").chmod(0o755)
    (rule,) = (r for r in build_file.rules("g++", "", str(tmp_path / "nvcc")) if "rule nvcc" in r)
    command = rule.split("command = ")[1].splitlines()[0].replace("$$", "$")
    command = command.replace("$out", "x.o").replace("$flags", "").replace("$in", "x.cu")
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status
    assert prints in done.stdout


def test_every_source_is_compiled(build_file, monkeypatch):
    """At any depth below csrc; kernels of the CPU once for each level of their room."""
    monkeypatch.delenv("CXX", raising=False)
    text = build_file.ninja_file("nvcc", ["9.0"])
    for path in sorted((ROOT / "csrc").rglob("*.c[pu]*")):
        source = path.relative_to(ROOT).as_posix()
        times = text.count(f"../../{source}\n")
        if path.suffix == ".cuh":
            assert times == 0
        elif path.name.endswith("_cpu.cpp"):
            rooms = [rooms for _, rooms in build_file.LEVELS.values()]
            assert times == sum(room in ("*", source.split("/")[1]) for room in rooms)
        else:
            assert times == (2 if path.name.startswith("ops") else 1), source


def test_the_fingerprint_changes_with_a_source(build_file, monkeypatch, tmp_path):
    (tmp_path / "csrc" / "norm").mkdir(parents=True)
    source = tmp_path / "csrc" / "norm" / "x.cu"
    source.write_text("one")
    build_file_copy = tmp_path / "ninja.py"
    build_file_copy.write_text("")
    monkeypatch.setattr(build_file, "ROOT", tmp_path)
    monkeypatch.setattr(build_file, "__file__", str(build_file_copy))
    before = build_file.fingerprint()
    assert before == build_file.fingerprint()
    source.write_text("two")
    assert build_file.fingerprint() != before


def python(*arguments: object, cwd: Path, executable: Path | str = sys.executable, **env: str):
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    command = [str(executable), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=outside | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_metadata_needs_no_torch():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    assert python("-c", code, cwd=ROOT).strip() == "llamatelemetry"


@pytest.mark.slow
def test_sdist_to_wheel_to_fresh_environment(tmp_path):
    """What a user without a checkout does, with the CPU library alone to be quick."""
    source = tmp_path / "source"
    # The libraries and the file of what they hold are copied: a built tree's sdist has neither.
    left = (".*", "build", "dist", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left))
    python("setup.py", "-q", "sdist", "-d", tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("llamatelemetry-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    needed = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.[ch]*")}
    assert needed | {"build_tools/ninja.py", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.py"))]
    assert not [name for name in names if name.startswith("tests/")]

    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    # The archive keeps the files' times, so ninja compiles only what this checkout has not built.
    if (ROOT / "build" / "ninja").exists():
        shutil.copytree(ROOT / "build" / "ninja", unpacked / "build" / "ninja")
    wheel_command = (
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path,
    )
    python(*wheel_command, unpacked, cwd=tmp_path, LLAMATELEMETRY_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.stem.split("-")[4].startswith("linux_")
    libraries = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    assert libraries == ["llamatelemetry/lib/libllamatelemetry_cpu.so"]

    venv.create(tmp_path / "venv", with_pip=False)
    fresh = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import llamatelemetry as lt; print(lt.__file__, lt.ops.rms_norm.__name__, lt.__version__)"
    )
    where, _, version = python("-c", code, executable=fresh, cwd=tmp_path).split()
    assert where.startswith(str(site))
    assert version in wheel.name


def test_make_never_rebuilds_the_venv_from_itself(tmp_path):
    """`make` with the project's own .venv active makes it anew from the Python below."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    venv.create(tmp_path / ".venv", with_pip=False)

    def base_python(python):
        done = subprocess.run(
            ["make", "-np", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
        )
        return next(x for x in done.stdout.splitlines() if x.startswith("BASE_PYTHON :="))

    assert base_python(sys.executable).endswith(sys.executable)
    inner = base_python(tmp_path / ".venv/bin/python")
    assert str(tmp_path) not in inner
    assert Path(inner.split()[-1]).exists()
