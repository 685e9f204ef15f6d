"""Loading: each way to fail says what is wrong and the way out; CUDA is not needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_checks import op_of

from llamatelemetry._native import kernels, library

PACKAGE = Path(library.__file__).parents[1]


@pytest.fixture
def package(tmp_path):
    """A copy of the package that a test may break."""
    shutil.copytree(PACKAGE, tmp_path / "llamatelemetry")
    return tmp_path / "llamatelemetry"


def imported(package: Path, code: str = "import llamatelemetry", **env: str) -> str:
    """The last line that a fresh Python prints for code."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": str(package.parent)} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_missing_library(package):
    library = package / "lib" / "libllamatelemetry_cpu.so"
    library.unlink()
    message = imported(package)
    assert f"{library} is missing; reinstall with: pip install" in message


def test_broken_library(package):
    library = package / "lib" / "libllamatelemetry_cpu.so"
    library.write_text("not a library")
    message = imported(package)
    assert f"{library} does not load" in message
    assert "file too short" in message or "invalid ELF header" in message
    assert "; reinstall with: pip install" in message


def test_torch_too_old(package):
    code = "import torch; torch.__version__ = '2.9.1+cu128'; import llamatelemetry"
    assert "llamatelemetry needs torch >= 2.10, got 2.9.1+cu128" in imported(package, code)


def test_unknown_cpu_level(package):
    message = imported(package, LLAMATELEMETRY_CPU_ISA="sse9")
    assert "LLAMATELEMETRY_CPU_ISA must be scalar, avx2, avx512, avx512bf16 or amx" in message
    assert "got 'sse9'" in message


@pytest.mark.parametrize("level", library.lower_cpu_isas())
def test_lower_cpu_level(package, level):
    code = "from llamatelemetry._native import library; print(library.cpu_isa())"
    assert imported(package, code, LLAMATELEMETRY_CPU_ISA=level) == level


def test_without_the_cuda_library(package):
    """As after a build without nvcc, under a torch with CUDA."""
    (package / "lib" / "libllamatelemetry_cuda.so").unlink(missing_ok=True)
    code = (
        "import torch; torch.version.cuda = '13.0'; import llamatelemetry as lt; "
        "x = torch.randn(2, 8); lt.ops.rms_norm(x, torch.ones(8)); "
        "key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA); "
        "torch.ops.llamatelemetry.rms_norm.default.redispatch(key, x, x, 1e-6)"
    )
    message = imported(package, code)
    assert "rms_norm: tensors must be on the CPU, got CUDA tensors" in message
    assert "built without CUDA; put nvcc on PATH and reinstall with: pip install" in message


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_call_under_a_cpu_torch():
    assert kernels.without_cuda.keys() == set(kernels.op_names())
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match=r"^rms_norm: tensors must .*this torch has no CUDA$"):
        op_of("rms_norm").redispatch(key, x, x, 1e-6)


@pytest.mark.gpu
def test_every_op_has_a_cuda_kernel():
    assert kernels.without_cuda == {}
