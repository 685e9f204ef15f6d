"""Requests of random shape and cancellation, with beams and drafts, leave nothing behind:
benchmarks/soak.py in small, too short for swaps in every run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import soak
import torch


def test_nothing_is_left_of_many_requests():
    with torch.inference_mode(False):
        report = soak.soak(soak.tiny_batcher(), 150, warm_up=60)
    assert sum(report.ends.values()) >= 150
    assert {"length", "cancelled", "stop"} <= report.ends.keys()
    assert min(report.counts[name] for name in ("accepted", "of beams")) > 0
    assert report.counts.keys() >= {"preemptions", "swapped blocks"}  # 0 too is said
    before, after = report.before, report.after
    assert (after.open_requests, after.used_blocks) == (0, 0)
    assert after.threads == before.threads
    assert after.file_handles == before.file_handles
    assert after.memory_mib - before.memory_mib < 64
