"""The notebooks run from top to bottom, and what is committed of them is their source's."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 120  # of a notebook, from the start of its kernel


def _render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "notebooks" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = _render()
names = pytest.mark.parametrize("source", render.NOTEBOOKS, ids=lambda path: path.stem)


def text_of(notebook) -> str:
    """All text of a notebook's outputs, pictures left out."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found += [output.get("text", ""), *output.get("traceback", [])]
            found += [v for k, v in output.get("data", {}).items() if not k.startswith("image/")]
    return "".join(map(str, found))


@names
def test_source_and_notebook_hold_the_same_cells(source):
    want = render.read(source)
    got = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(got)
    assert [(c.cell_type, c.source) for c in got.cells] == [
        (c.cell_type, c.source) for c in want.cells
    ], f"run: python notebooks/render.py {source.stem}"
    assert got.metadata == want.metadata


@names
def test_committed_outputs(source):
    """Every cell was run, in order and without an error; nothing names a machine."""
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)
    assert not re.search(r"(?<![\w.])/(home|root|Users|work|opt|tmp|usr)/", json.dumps(notebook))


def test_every_notebook_has_a_source():
    made = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert made == [source.stem for source in render.NOTEBOOKS] != []


@pytest.mark.parametrize("name", render.PICTURES)
def test_the_picture_is_the_notebooks(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    path = render.PICTURES[name]
    assert path.read_bytes() == render.picture(notebook)
    assert f"]({path.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text()


def test_quickstart_without_its_model(monkeypatch, capsys):
    """Where the package with SmolLM2 is missing, a random model is loaded, and said to be one."""
    from llamatelemetry.loading import find

    monkeypatch.setitem(find.PACKAGED, "smollm2", "a-package-that-is-not-installed")
    cells = [c for c in render.read(render.NOTEBOOKS[0]).cells if c.cell_type == "code"]
    names = {}
    with torch.inference_mode(False):
        for cell in cells[:3]:
            exec(cell.source, names)
    said = capsys.readouterr().out
    assert "a random model stands in" in said
    assert names["name"] == "a random Llama"
    assert f"{names['NEW_TOKENS']} tokens in" in said


@pytest.mark.slow
@names
def test_notebook_runs(source, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two would wait for each other on a busy machine
    begin = time.monotonic()
    notebook = render.execute(source)
    assert time.monotonic() - begin < MOST_SECONDS
    assert text_of(notebook).strip()
