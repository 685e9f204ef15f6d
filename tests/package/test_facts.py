"""What the library says of itself is what torch and the build know."""

from __future__ import annotations

import pytest
import torch

from llamatelemetry._build_info import CPU_ISA_LEVELS
from llamatelemetry._native import facts, library
from llamatelemetry.ops import append_kv_, flash_attn, quant_linear


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
