"""The notebooks' sources run from top to bottom on a GPU, as scripts, without Jupyter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
# What each says where it has a GPU; 05_write_an_op writes an op of the CPU alone.
SAID = {
    "01_quickstart": ["replaced:"],
    "02_flash_attention": ["device: cuda", "an implementation serves it: True"],
    "03_tensor_cores_and_graphs": ["supported: True", "a CUDA graph: True", "weights are torch.fl"],
    "04_kv_cache_and_batching": ["device: cuda", "requests have the same tokens"],
    "06_kaggle_t4": ["cuda:0", "dtype of the models below: torch.float16"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAID)
def test_notebook_runs_on_a_gpu(name):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join(paths)}
    source = ROOT / "notebooks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(source)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for words in SAID[name]:
        assert words in done.stdout


def test_every_notebook_but_the_ops_runs_on_a_gpu():
    stems = {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.py")}
    assert stems == {*SAID, "05_write_an_op"}
