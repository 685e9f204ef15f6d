"""What the library says of itself is what torch and the build know."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from llamatelemetry._build_info import CPU_ISA_LEVELS
from llamatelemetry._native import facts, library
from llamatelemetry.ops import append_kv_, flash_attn, quant_linear

UNDER_GERMAN = """
import locale
try:
    locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
except locale.Error:
    raise SystemExit(3)
assert locale.localeconv()["decimal_point"] == ","
from llamatelemetry._native import facts
assert list(facts.FORMATS["NF4"].values)[0] == -1.0
"""


def test_fields_fill_the_block():
    for format in facts.FORMATS.values():
        spans = sorted(format.fields.values())
        ends = [offset + size for offset, size in spans]
        assert [offset for offset, _ in spans] == [0, *ends[:-1]], format.name
        assert ends[-1] == format.block_bytes


def test_levels_are_the_build_s():
    assert facts.CPU_LEVELS[: len(CPU_ISA_LEVELS)] == CPU_ISA_LEVELS
    assert library.cpu_isa() in facts.CPU_LEVELS


def test_dtypes_are_torch_s():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in facts.DTYPES)
    assert facts.DTYPES[:3] == ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("name", facts.DTYPES[3:])
def test_storage_dtypes_are_refused(name):
    """An op that does not take them says so, rather than reading them as float32."""
    x = torch.zeros(1, 1, 1, 32).to(getattr(torch, name))
    with pytest.raises(RuntimeError, match=rf"must be float32, float16 or bfloat16, got {name}"):
        flash_attn(x, x, x)
    with pytest.raises(RuntimeError, match=rf"must be float32, float16 or bfloat16, got {name}"):
        quant_linear(x[0, 0], torch.zeros(1, 0, dtype=torch.uint8), "Q8_0", 16)
    cache = torch.zeros(1, 1, 1, 32)
    with pytest.raises(RuntimeError, match=rf"append_kv_: k must have .*, got {name}"):
        append_kv_(x[0], x[0], cache, cache.clone(), torch.zeros(1, dtype=torch.int64))


def test_facts_are_read_in_any_locale(tmp_path):
    """The program around us may have numbers written with a decimal comma."""
    if (localedef := shutil.which("localedef")) is not None:
        made = ["-i", "de_DE", "-f", "UTF-8", "--no-archive", str(tmp_path / "de_DE.UTF-8")]
        subprocess.run([localedef, *made], capture_output=True)
    where = {"LOCPATH": str(tmp_path)} if any(tmp_path.iterdir()) else {}
    done = subprocess.run(
        [sys.executable, "-c", UNDER_GERMAN], capture_output=True, text=True, env=os.environ | where
    )
    if done.returncode == 3:
        pytest.skip("needs localedef, or a locale with a decimal comma")
    assert done.returncode == 0, done.stderr
