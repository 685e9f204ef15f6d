"""Loading: each way to fail says what is wrong and the way out; CUDA is not needed."""

from __future__ import annotations

import json
import os
import platform
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


def imported(package: Path, code: str = "import llamatelemetry.ops", **env: str) -> str:
    """The last line that a fresh Python prints for code."""
    return imported_lines(package, code, **env)[-1]


def imported_lines(package: Path, code: str, **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": str(package.parent)} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout + done.stderr).strip().splitlines()


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


def of_another_machine(library: Path) -> None:
    """Rewrites the header: IBM S/390 is a machine that nobody runs these tests on."""
    data = bytearray(library.read_bytes())
    data[18:20] = (22).to_bytes(2, "little")
    library.unlink()
    library.write_bytes(data)


def test_library_of_another_platform(package):
    of_another_machine(package / "lib" / "libllamatelemetry_cpu.so")
    here = platform.machine()
    assert f"it is built for another machine, this Python runs on {here}" in imported(package)


def remove(library: Path) -> None:
    library.unlink()


def damage(library: Path) -> None:
    library.unlink()
    library.write_text("not a library")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (remove, "is missing"),
        (damage, "does not load: "),
        (of_another_machine, "it is built for another machine"),
    ],
)
def test_doctor_without_a_library(package, harm, reason):
    """The package imports, and the doctor says what is wrong: the case that it is for."""
    harm(package / "lib" / "libllamatelemetry_cpu.so")
    code = (
        "import llamatelemetry, llamatelemetry.cli.main as cli; "
        "print(cli.main(['doctor', '--json']))"
    )
    *text, status = imported_lines(package, code)
    found = json.loads("\n".join(text))
    assert status == "1"
    assert reason in found["build"]["problem"]
    assert "; reinstall with: pip install" in found["build"]["problem"]
    assert found["ops"] == {}
    assert found["build"]["libraries"] == {"cpu": None, "cuda": None}
    assert found["machine"]["versions"]["torch"] == torch.__version__
    plain = imported_lines(package, code.replace(", '--json'", ""))
    assert any(line.split()[:5] == ["problem", "no", "op", "runs", "here:"] for line in plain)


def test_doctor_without_build_or_torch(package):
    """As in a fresh checkout, in an environment that has no torch at all."""
    shutil.rmtree(package / "lib")
    (package / "_build_info.py").unlink()
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import llamatelemetry.cli.main as cli; print(cli.main(['doctor', '--json']))"
    )
    *text, status = imported_lines(package, code)
    found = json.loads("\n".join(text))
    assert status == "1"
    assert "import of torch" in found["build"]["problem"]
    assert found["machine"]["versions"]["torch"] == "none that imports"


def test_torch_that_does_not_load(package):
    """Its own libraries are missing: an OSError, and generate and why_no_library say so."""
    (package.parent / "torch.py").write_text("raise OSError('libcudart.so: cannot open')")
    code = "from llamatelemetry._native import library; print(library.why_no_library())"
    assert imported(package, code) == "torch does not import: libcudart.so: cannot open"
    code = "import llamatelemetry.cli.main as cli; print(cli.main(['doctor']))"
    assert imported(package, code) == "1"


def test_generate_without_a_library(package):
    """One sentence and exit code 1, not a traceback."""
    remove(package / "lib" / "libllamatelemetry_cpu.so")
    code = "import llamatelemetry.cli.main as cli; print(cli.main(['generate', 'hi']))"
    status, sentence = imported_lines(package, code)
    assert status == "1"
    assert sentence.startswith("llamatelemetry: ")
    assert "libllamatelemetry_cpu.so is missing; reinstall with: pip install" in sentence


def test_the_help_speaks_to_users(package):
    code = "import llamatelemetry.cli.main as cli; cli.main(['--help'])"
    text = " ".join(imported_lines(package, code))
    assert "Generates text with a local model" in text
    assert "subcommand" not in text


def test_cuda_library_that_does_not_load(package):
    """Ops still run on the CPU; a CUDA call says what is wrong."""
    (package / "lib" / "libllamatelemetry_cuda.so").unlink(missing_ok=True)
    (package / "lib" / "libllamatelemetry_cuda.so").write_text("not a library")
    code = (
        "import torch; torch.version.cuda = '13.0'; import llamatelemetry as lt; "
        "x = torch.randn(2, 8); lt.ops.rms_norm(x, torch.ones(8)); "
        "key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA); "
        "torch.ops.llamatelemetry.rms_norm.default.redispatch(key, x, x, 1e-6)"
    )
    message = imported(package, code)
    assert "rms_norm: tensors must be on the CPU, got CUDA tensors" in message
    assert "libllamatelemetry_cuda.so does not load: " in message


def test_torch_too_old(package):
    code = "import torch; torch.__version__ = '2.9.1+cu128'; import llamatelemetry.ops"
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
