"""setup.py: arch lists, switches, the sdist, and a wheel built from it in a fresh environment."""

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
def setup():
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
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
def test_arch_list(setup, text, archs):
    assert setup.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["7.0", "sm_80", "8", "8.0+ptx", "8.0;6.1", "9.0a", "8.0 PTX"])
def test_arch_list_refusals(setup, text):
    with pytest.raises(SystemExit, match=r"LLAMATELEMETRY_CUDA_ARCHS must be >= 7.5") as caught:
        setup.parse_archs(text)
    assert repr(text) in str(caught.value)


def test_arch_flags(setup):
    archs = ["7.5", "9.0+PTX"]
    assert setup.arch_flags("gemm.cu", archs).split() == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert setup.arch_flags("gemm_sm90.cu", archs) == "-gencode=arch=compute_90a,code=sm_90a"
    assert setup.arch_flags("gemm_sm90.cu", ["8.0"]) == ""


def test_cuda_switch(setup, monkeypatch, tmp_path, capsys):
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for value, found in (("auto", True), ("1", True), ("0", False)):
        monkeypatch.setenv("LLAMATELEMETRY_CUDA", value)
        assert setup.find_nvcc() == (str(tmp_path / "nvcc") if found else None)
    assert "CPU-only build" in capsys.readouterr().out
    monkeypatch.setenv("LLAMATELEMETRY_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        setup.find_nvcc()


def test_no_nvcc(setup, monkeypatch):
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(setup.shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setenv("LLAMATELEMETRY_CUDA", "auto")
    assert setup.find_nvcc() is None
    monkeypatch.setenv("LLAMATELEMETRY_CUDA", "1")
    with pytest.raises(SystemExit, match="needs nvcc on PATH or in NVCC"):
        setup.find_nvcc()


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
    built = (".*", "build", "dist", "lib", "_build_info.py", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*built))
    python("setup.py", "-q", "sdist", "-d", tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("llamatelemetry-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    needed = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.[ch]*")}
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.py"))]

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
