"""The harness: equal results or nothing, ratios by round, and documents no older than the JSON."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness  # noqa: E402
import plots  # noqa: E402
import tables  # noqa: E402
from harness import Case, Row  # noqa: E402

CPU = torch.device("cpu")


def row(**changes):
    fields = {
        "name": "8x8",
        "ours": [10.0, 20.0, 10.0],
        "baselines": {"torch": [20.0, 60.0, 40.0], "other": [15.0, 30.0, 15.0]},
        "limits": {"copy": [5.0, 15.0, 5.0]},
        "bytes_moved": 10_000,
    }
    return Row(**fields | changes)


def test_ratios_are_taken_within_a_round():
    assert row().speedup("torch") == 3.0
    assert row().best_baseline() == "other"
    assert row().percent_of_limit() == 50.0
    assert row().throughput() == "1 GB/s"
    assert row(flops=20_000_000).throughput() == "2.0 TFLOP/s"
    assert row(baselines={}, limits={}).best_baseline() is None
    assert row(limits={}).percent_of_limit() is None


def test_another_result_is_not_timed():
    x = torch.randn(4, 4)
    case = Case("4x4", (x,), ours=lambda x: x + 1, baselines={"torch": lambda x: x})
    with pytest.raises(AssertionError, match=r"4x4, against torch: results differ by 1"):
        harness.measure(case, CPU, rounds=1)
    case = Case("4x4", (x,), ours=lambda x: x[:2], baselines={"torch": lambda x: x})
    with pytest.raises(AssertionError, match=r"shape \(2, 4\), theirs \(4, 4\)"):
        harness.measure(case, CPU, rounds=1)


def test_an_op_that_writes_its_input_is_measured(monkeypatch):
    monkeypatch.setattr(harness, "SAMPLE_US", 10)
    case = Case(
        "8x8",
        (torch.randn(8, 8),),
        ours=lambda x: x.mul_(1.0),
        baselines={"torch": lambda x: x * 1.0},
        bytes_moved=512,
        flops=64,
        flops_dtype=torch.float32,
    )
    measured = harness.measure(case, CPU, rounds=3)
    assert len(measured.ours) == len(measured.baselines["torch"]) == 3
    assert measured.limits.keys() == {"read", "matmul float32"}
    assert min(measured.ours) > 0


def test_save_and_load(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.save("example", CPU, [row()])
    assert path.name == "example-cpu.json"
    environment, rows = harness.load(path)
    assert rows == [row()]
    assert {"cpu", "threads", "gpus", "driver", "versions", "commit", "date"} <= environment.keys()
    cpu, cuda = (tables.table(f"example-{device}", rows) for device in ("cpu", "cuda"))
    assert cpu.splitlines()[2] == "| 8x8 | 50 | 3.00 | 1.50 |"
    assert cuda.splitlines()[2] == "| 8x8 | 10.0 (10.0 – 20.0) | 1 GB/s | 50 | 3.00 | 1.50 |"


def test_a_table_of_some_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.save("example", CPU, [row(), replace(row(), name="full 4")])
    text = "<!-- table: example-cpu (^full) -->\nold\n<!-- end -->\n"
    assert "| full 4 | 50 | 3.00 | 1.50 |" in tables.updated(text)
    assert "8x8" not in tables.updated(text)
    assert tables.updated(tables.updated(text)) == tables.updated(text)


def test_documents_are_up_to_date():
    for path in tables.DOCUMENTS:
        assert tables.updated(path.read_text()) == path.read_text(), "run benchmarks/tables.py"


def test_every_bench_file_runs_through_the_harness():
    for path in BENCHMARKS.glob("bench_*.py"):
        assert "harness" in path.read_text(), path.name


def test_plots_show_what_was_measured():
    for file, name in plots.PLOTS.items():
        if (plots.DOCS / file).exists():
            text = (plots.DOCS / file).read_text()
            assert plots.fingerprint(name) in text, "run benchmarks/plots.py"
