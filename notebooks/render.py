"""Runs the notebooks and writes their outputs: python notebooks/render.py [NAME ...]

NN_name.py, in jupytext's percent format, is the source. NN_name.ipynb beside it is what this makes:
the same cells with what they gave on this machine, and of some the picture for README.md. Edit the
.py, then run this.
"""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").glob("[0-9]*.py"))
PICTURES = {"02_flash_attention": ROOT / "docs" / "flash_attention_cpu.png"}
MOST_SECONDS = 600  # of a cell; a machine at rest needs a few


def read(source: Path) -> Any:
    """The cells of a .py, with ids that stay the same from run to run."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    return notebook


def execute(source: Path) -> Any:
    """The notebook with outputs; an exception in a cell comes through as CellExecutionError."""
    notebook = read(source)
    client = NotebookClient(
        notebook,
        timeout=MOST_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(stderr=subprocess.DEVNULL)  # of the process: what libraries write past Python
    notebook.metadata["language_info"] = {"name": "python"}  # without the machine's versions
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := cleaned(output))]
    return notebook


def cleaned(output: Any) -> Any:
    """An output without what names this machine: None where nothing else is in it.

    Of stderr our own warnings stay, without the file that they name; other packages write about
    themselves there.
    """
    if output.output_type == "stream" and output.name == "stderr":
        ours = re.findall(r"/llamatelemetry/\S+\.py:\d+: (\w+: .*)", output.text)
        output.text = "".join(f"{line}\n" for line in dict.fromkeys(ours))
        return output if output.text else None
    return output


def picture(notebook: Any) -> bytes:
    """The first picture among the outputs, as PNG."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    data = (output.get("data", {}).get("image/png") for output in outputs)
    return base64.b64decode(next(png for png in data if png))


def main(names: list[str]) -> int:
    known = {source.stem: source for source in NOTEBOOKS}
    if unknown := sorted(set(names) - known.keys()):
        print(f"render.py: names must be of {sorted(known)}, got {unknown}", file=sys.stderr)
        return 2
    for name in names or known:
        notebook = execute(known[name])
        nbformat.write(notebook, known[name].with_suffix(".ipynb"))
        if name in PICTURES:
            PICTURES[name].write_bytes(picture(notebook))
        print(f"{name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
