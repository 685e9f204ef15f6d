"""llamatelemetry doctor: the right kernel for each GPU, and an answer on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamatelemetry import machine
from llamatelemetry._native import coverage, kernels, library
from llamatelemetry.cli import doctor
from llamatelemetry.cli.main import main
from llamatelemetry.ops import backends
from llamatelemetry.ops.backends import attention_choice

H200 = {"name": "NVIDIA H200", "capability": "9.0", "memory": "139 GiB"}


@pytest.fixture
def gpu(monkeypatch):
    """Gives the machine a GPU that only the doctor sees; returns how to choose its capability."""

    def put(capability: str) -> None:
        monkeypatch.setattr(machine, "gpus", lambda: [H200 | {"capability": capability}])

    monkeypatch.setattr(coverage, "cuda_archs", lambda: ["7.5", "8.0", "9.0+PTX"])
    monkeypatch.setattr(coverage, "has_triton", lambda: False)
    monkeypatch.setattr(library, "why_no_cuda_library", lambda: None)
    monkeypatch.setattr(library, "_cuda_library", lambda: None)
    monkeypatch.setattr(kernels, "without_cuda", {"softmax": "it has a CPU kernel only"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return put


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ("7.5", "sm_75"),
        ("8.0", "sm_80"),
        ("8.9", "sm_80"),
        ("9.0", "sm_90"),
        ("10.0", "PTX 9.0, compiled by the driver at first use"),
        ("7.0", None),
    ],
)
def test_cuda_code(capability, code):
    assert coverage.cuda_code(capability, ["7.5", "8.0", "9.0+PTX"]) == code


def test_cuda_code_without_ptx():
    assert coverage.cuda_code("9.0", ["8.6"]) is None
    assert coverage.cuda_code("8.0", ["8.6"]) is None


def test_attention_says_what_is_chosen(gpu, monkeypatch):
    def on_hopper(op, dtype):
        return attention_choice(op, dtype, capability=90)

    gpu("9.0")
    monkeypatch.setattr(backends, "attention_choice", on_hopper)
    sm90 = "sm90, large tiles"
    assert (
        doctor.cuda_kernel("flash_attn")
        == f"float16: {sm90}; bfloat16: {sm90}; float32: simt, rows"
    )
    assert doctor.cuda_kernel("paged_attention") == (
        "float16: decode, rows; bfloat16: decode, rows; float32: simt, rows"
    )


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"].keys() == set(kernels.op_names())
    assert found["ops"]["rms_norm"]["cpu"] == found["build"]["cpu_level"] == library.cpu_isa()
    assert found["machine"]["versions"]["torch"] == torch.__version__
    if not torch.cuda.is_available():
        assert all(kernel["cuda"].startswith("none: ") for kernel in found["ops"].values())


def test_with_a_gpu(gpu, capsys):
    gpu("9.0")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"]["rms_norm"]["cuda"] == "sm_90"
    assert found["ops"]["softmax"]["cuda"] == "none: it has a CPU kernel only"
    assert found["machine"]["gpus"][0]["name"] == "NVIDIA H200"


def test_with_a_gpu_too_old(gpu):
    gpu("7.0")
    reason = "the GPU has compute capability 7.0, this build holds 7.5, 8.0, 9.0+PTX"
    assert doctor.cuda_kernel("rms_norm") == f"none: {reason}"


def test_triton_serves_a_gpu_that_the_build_does_not(gpu, monkeypatch, capsys):
    gpu("7.0")
    monkeypatch.setattr(coverage, "has_triton", lambda: True)
    reason = "the GPU has compute capability 7.0, this build holds 7.5, 8.0, 9.0+PTX"
    assert doctor.cuda_kernel("rms_norm") == "triton"
    assert doctor.cuda_kernel("quant_linear") == "triton: U4, S4, S8"
    assert doctor.cuda_kernel("paged_attention") == "triton: caches of 16 or 32 bits"
    assert doctor.cuda_kernel("repack") == f"none: {reason}"
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["build"]["backend"]
    assert found == {"name": "triton", "why": reason}
    assert coverage.backend_for(torch.device("cuda")) == ("triton", reason)
    assert coverage.backend_for(torch.device("cpu")) == ("native", None)
    gpu("9.0")
    assert coverage.backend_for(torch.device("cuda", 0)) == ("native", None)


def test_triton_serves_a_torch_without_cuda(gpu, monkeypatch):
    """AMD's, say."""
    gpu("9.4")
    monkeypatch.setattr(coverage, "has_triton", lambda: True)
    monkeypatch.setattr(library, "why_no_cuda_library", lambda: "this torch has no CUDA")
    assert doctor.cuda_kernel("linear") == "triton"
    assert coverage.backend_for(torch.device("cuda")) == ("triton", "this torch has no CUDA")


@pytest.mark.parametrize("rich_installed", [True, False])
def test_text(rich_installed, monkeypatch, capsys):
    if not rich_installed:
        monkeypatch.setitem(sys.modules, "rich.box", None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for op in kernels.op_names():
        assert op in text
    assert library.cpu_isa() in text
    assert torch.__version__ in text


def test_old_driver(monkeypatch):
    """One sentence, where torch itself finds the driver too old, and where only our kernels do."""
    monkeypatch.setattr(library, "driver_cuda", lambda: (12, 4))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    sentence = library.why_old_driver()
    assert sentence == (
        "the NVIDIA driver serves CUDA up to 12.4 and torch is built for 13.0; "
        "update the driver to 580 or newer"
    )
    monkeypatch.setattr(library, "why_no_cuda_library", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.cuda_kernel("rms_norm") == f"none: {sentence.partition(';')[0]}"

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(library, "library_path", lambda name: Path(__file__))
    monkeypatch.setattr(library, "build_info", lambda name, default: "13.0")
    assert "llamatelemetry is built for 13.0" in library.why_old_driver()
    monkeypatch.setattr(library, "driver_cuda", lambda: (13, 0))
    assert library.why_old_driver() is None
    monkeypatch.setattr(library, "driver_cuda", lambda: None)
    assert library.why_old_driver() is None


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["generate", "--help"]])
def test_help_imports_no_torch(arguments):
    code = (
        "import sys\nfrom llamatelemetry.cli.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n"
        "    print(sorted({'torch', 'transformers', 'llamatelemetry.ops'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("usage: ")
    assert done.stdout.splitlines()[-1] == "[]"


def test_triton_serves_the_ops_of_an_opset():
    pytest.importorskip("transformers")
    from dataclasses import fields

    from llamatelemetry.models.opset import GATED, OpSet
    from llamatelemetry.quantization.rows import Quantising

    names = {field.name for field in fields(OpSet)} & set(kernels.op_names())
    quantising = {name.replace("_quantize", "") for name in Quantising._fields}
    made = {name for name in coverage.TRITON_OPS if name.replace("_quantize", "") in quantising}
    assert len(made - names - set(GATED.values())) == len(Quantising._fields)
    assert names | set(GATED.values()) | made | {"quant_linear"} == coverage.TRITON_OPS.keys()
