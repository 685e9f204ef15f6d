"""The generate command: refusals are one sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from directories import change, write_directory
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
        ("--top-k", -3, "top_k must be at least 0 (0 keeps all), got -3"),
        ("--top-k", 2**40, "top_k must be below 2**31"),
        ("--repetition-penalty", 0, "repetition_penalty must be positive"),
        ("--seed", 2**64, "seed must fit in 64 bits"),
        ("--num-speculative-tokens", -1, "--num-speculative-tokens must lie in [0, 15], got -1"),
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


def _as_of_transformers(name):
    """What its lazy modules raise where a package that they need is missing."""
    error = ModuleNotFoundError("Could not import module 'AttentionInterface'.")
    error.__cause__ = ModuleNotFoundError(f"No module named '{name}'", name=name)
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers"),
            "generate needs tokenizers, which is not installed; install what it needs with: pip "
            "install",
        ),
        (_as_of_transformers("safetensors"), "generate needs safetensors, which is not installed"),
        (ImportError("llamatelemetry: the library is missing; way out"), "the library is missing"),
    ],
    ids=["extra", "lazy", "library"],
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
    def allocate(*_, **__):
        raise error

    write_model(tmp_path / "tiny.gguf", "llama")
    monkeypatch.setattr(generation, "StepRunner", allocate)
    assert "memory" in refused(capsys, "--model", tmp_path / "tiny.gguf", "--max-tokens", 4)


def tiny(tmp_path, **changes):
    path = tmp_path / "tiny.gguf"
    write_model(path, **changes)
    return path


def test_counts_of_one(capsys, tmp_path):
    path = tiny(tmp_path)
    assert main(["generate", "the", "--model", str(path), "--max-tokens", "1"]) == 0
    err = capsys.readouterr().err
    assert "generated 1 token ·" in err
    assert "generation speed none" in err


def test_drafts_are_counted_and_change_nothing(capsys, tmp_path):
    write_model(tmp_path / "tiny.gguf", "llama")
    asked = ["generate", "cat", "--model", str(tmp_path / "tiny.gguf"), "--max-tokens", "40"]
    texts = []
    for more in ([], ["--num-speculative-tokens", "4"]):
        assert main([*asked, "--exact", *more]) == 0
        out, err = capsys.readouterr()
        assert ("drafted tokens" in err) == bool(more)
        assert "0 of 0 right" not in err
        assert "generated 40 tokens" in err
        texts.append(out)
    assert texts[0] == texts[1]


def test_a_system_prompt_and_a_model_s_own_defaults(capsys, tmp_path):
    path = write_directory(
        tmp_path / "model", chat_template="{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    change(path / "generation_config.json", do_sample=True, temperature=0.9, eos_token_id=None)

    def out(*arguments):
        assert main(["generate", "abc", "--model", str(path), "--max-tokens", "9", *arguments]) == 0
        return capsys.readouterr().out

    own = out("--seed", "3")
    assert own == out("--seed", "3", "--temperature", "0.9")
    assert own != out("--seed", "3", "--temperature", "0")
    assert out("--system", "xyz", "--seed", "3") != own


def test_logits_of_nan_are_named(capsys, tmp_path):
    nan = np.full(256, np.nan, np.float32)
    path = tiny(
        tmp_path,
        without=["output_norm.weight"],
        extra=lambda w: w.add_tensor("output_norm.weight", nan),
    )
    assert "the model's logits are NaN" in refused(capsys, "--model", path, "--max-tokens", 4)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('no') }}", "prompt: the model's chat template refuses it: no"),
        ("{{ 10 ** (10 ** 8) }}", "prompt: the model's chat template makes a number too large"),
    ],
)
def test_a_chat_template_that_raises(capsys, tmp_path, template, sentence):
    path = tiny(tmp_path, extra=lambda writer: writer.add_chat_template(template))
    assert sentence in refused(capsys, "--model", path)


@pytest.mark.parametrize("damage", ["weights", "config"])
def test_a_damaged_directory_is_one_line(capsys, tmp_path, damage):
    path = write_directory(tmp_path / "model")
    if damage == "weights":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[:-9])
    else:
        (path / "config.json").write_text("[]")
    assert str(path) in refused(capsys, "--model", path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "caf\udce9.gguf"])
def test_names_that_are_none(capsys, name):
    refused(capsys, "--model", name)


def test_bytes_that_are_no_text(capsys):
    code = main(["generate", "caf\udce9"])
    err = capsys.readouterr().err
    assert (code, err) == (2, "llamatelemetry: PROMPT must be UTF-8, got the byte 0xe9 at 3\n")
    assert "--stop must be UTF-8" in refused(capsys, "--stop", "\udcff")
    assert "--system must be UTF-8, got half a surrogate pair" in refused(
        capsys, "--system", "\ud800"
    )


def test_an_error_of_ours_is_one_line(capsys, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("an op\nrefuses")

    monkeypatch.setattr(find, "load_model", fail)
    assert main(["generate", "x"]) == 1
    err = capsys.readouterr().err
    assert err == (
        "llamatelemetry: RuntimeError: an op refuses; --traceback shows where it came from\n"
    )
    with pytest.raises(RuntimeError):
        main(["generate", "x", "--traceback"])


def test_output_that_takes_no_more():
    script = (
        "import sys; from llamatelemetry.cli import output; "
        "sys.exit(output.guarded(lambda: output.emit('x' * 10**6) or 0))"
    )
    command = [sys.executable, "-c", script]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    said = b"llamatelemetry: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_answer_that_nobody_reads_ends_quietly(capsys, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    path = tiny(tmp_path)
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", Closed())
        assert main(["generate", "the", "--model", str(path), "--max-tokens", "4"]) == 141
    assert capsys.readouterr().err == ""


def test_characters_that_a_terminal_lacks(tmp_path):
    script = "import sys; from llamatelemetry.cli import output; " + (
        "output.replace_what_a_terminal_lacks(); output.emit('caf\\u00e9')"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (out.stdout, out.stderr) == (b"caf?", b"")


def test_help_loads_no_torch():
    script = (
        "import sys\nfrom llamatelemetry.cli.main import main\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'jinja2', 'rich'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.endswith("set()\n")
