"""The generate command: refusals are one sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import pytest
import torch
from gguf_models import write_model

from llamatelemetry.cli.main import main
from llamatelemetry.inference import generation
from llamatelemetry.loading import find


def refused(capsys, *arguments):
    code = main(["generate", "hello", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("llamatelemetry: ")
    assert err.count("\n") == 1, f"more than one line: {err}"
    return err


def test_a_missing_file_is_named(capsys, tmp_path):
    assert "nowhere.gguf" in refused(capsys, "--model", tmp_path / "nowhere.gguf")


def test_what_is_not_a_gguf_is_named(capsys, tmp_path):
    path = tmp_path / "notes.gguf"
    path.write_bytes(b"these are notes, not weights" * 10)
    err = refused(capsys, "--model", path)
    assert "notes.gguf" in err
    assert "GGUF" in err


def test_an_empty_directory_is_refused(capsys, tmp_path):
    assert "config.json" in refused(capsys, "--model", tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--temperature", -1, "temperature"),
        ("--top-p", 0, "top_p"),
        ("--top-p", 1.5, "top_p"),
        ("--min-p", 2, "min_p"),
        ("--top-k", -3, "top_k"),
    ],
)
def test_bad_sampling_parameters_are_named(capsys, option, value, named):
    assert named in refused(capsys, option, value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert "--device cuda needs a CUDA GPU" in refused(capsys, "--device", "cuda")


def test_a_prompt_longer_than_the_context_is_refused(capsys, tmp_path):
    write_model(tmp_path / "tiny.gguf", "llama")
    err = refused(capsys, "--model", tmp_path / "tiny.gguf", "--max-tokens", 1000)
    assert "must fit the model's context of 64 tokens" in err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers"),
            "generate needs tokenizers, which is not installed; install what it needs with: pip "
            'install --no-build-isolation ".[hf]"',
        ),
        (ImportError("llamatelemetry: the library is missing; way out"), "the library is missing"),
    ],
    ids=["extra", "library"],
)
def test_an_installation_that_cannot_serve_is_said(capsys, monkeypatch, error, sentence):
    def load(*_, **__):
        raise error

    monkeypatch.setattr(find, "load_model", load)
    assert main(["generate", "hello"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"llamatelemetry: {sentence}")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_running_out_of_memory_is_said(capsys, tmp_path, monkeypatch, error):
    def allocate(*_):
        raise error

    write_model(tmp_path / "tiny.gguf", "llama")
    monkeypatch.setattr(generation, "StepRunner", allocate)
    assert "memory" in refused(capsys, "--model", tmp_path / "tiny.gguf", "--max-tokens", 4)
