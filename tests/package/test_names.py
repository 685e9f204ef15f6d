"""Public names: each resolves, type checkers see the same, and importing costs nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAZY = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in ROOT.glob("llamatelemetry/**/__init__.py")
    if "lazy_names(" in path.read_text()
)
MOST_SECONDS = 0.3


def typed_names(module: object) -> set[str]:
    """What stands under TYPE_CHECKING in a package's __init__, modules apart."""
    tree = ast.parse(Path(module.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and n.test.id == "TYPE_CHECKING")
    return {
        alias.asname
        for node in block.body
        for alias in node.names
        if not (Path(ROOT, *node.module.split("."), alias.name).is_dir())
        and not Path(ROOT, *node.module.split("."), f"{alias.name}.py").exists()
    }


def test_the_packages_are_found():
    rooms = ("cuda", "inference", "models", "profiling")
    assert {"llamatelemetry", *(f"llamatelemetry.{room}" for room in rooms)} <= set(LAZY)


@pytest.mark.parametrize("package", LAZY)
def test_every_name_resolves_and_is_typed(package):
    module = importlib.import_module(package)
    assert set(module.__all__) == typed_names(module)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        value = getattr(module, name)
        assert isinstance(value, bool) or value.__name__ == name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_submodules_are_attributes():
    code = (
        "import llamatelemetry as lt; "
        "print(lt.ops.rms_norm.__name__, lt.models.patch.__name__, lt.cuda.CUDAGraph.__name__, "
        "lt.profiling.percentile.__name__, lt.inference.KVCache.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rms_norm", "patch", "CUDAGraph", "percentile", "KVCache"]


def test_import_time():
    """Processor time beyond torch's, the least of three, for the package and then for its ops."""
    code = (
        "import torch, time; start = time.process_time(); import llamatelemetry; "
        "middle = time.process_time(); llamatelemetry.ops.rms_norm; "
        "print(middle - start, time.process_time() - middle)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    package, ops = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
    assert min(package) < MOST_SECONDS / 10
    assert min(ops) < MOST_SECONDS


def test_importing_the_package_loads_no_torch():
    code = "import sys, llamatelemetry, llamatelemetry.inference; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
