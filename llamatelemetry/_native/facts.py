"""What C++ knows and Python needs, read once: formats, CPU levels, dtypes, limits.

csrc/facts.cpp writes it as JSON, so that no table stands in both languages.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from typing import Any

from llamatelemetry._native import library


@dataclass(frozen=True)
class FormatFacts:
    """A row of csrc/format/format.h.

    Attributes:
        name: What ops call the format.
        ggml_type: GGUF's number of it, None where it has none.
        codes: Code family, an enumerator of CodeFamily: "u4" for a nibble.
        scale_rule: An enumerator of ScaleRule: "block" for one scale a block, "group" for scales in
            a tensor of their own.
        zero_point: What is subtracted from a code.
        block_size: Weights of a block.
        block_bytes: Bytes of a block.
        fields: (offset, bytes) of each field of a block, in the order in which they are packed.
        values: What the 16 nibbles stand for, float32; empty where codes are integers or bytes.
    """

    name: str
    ggml_type: int | None
    codes: str
    scale_rule: str
    zero_point: int
    block_size: int
    block_bytes: int
    fields: dict[str, tuple[int, int]]
    values: tuple[float, ...] = ()


def _read() -> dict[str, Any]:
    lt_facts = library.cpu_library.lt_facts
    lt_facts.restype = ctypes.c_char_p
    return json.loads(lt_facts())


def _format(row: dict[str, Any]) -> FormatFacts:
    fields = {name: (offset, size) for name, (offset, size) in row.pop("fields").items()}
    values = row.pop("values", ())
    return FormatFacts(**row, fields=fields, values=tuple(values))


_facts = _read()
FORMATS: dict[str, FormatFacts] = {row["name"]: _format(row) for row in _facts["formats"]}
CPU_LEVELS: list[str] = _facts["cpu_levels"]
DTYPES: list[str] = _facts["dtypes"]
ATTENTION_BACKENDS: list[str] = _facts["attention_backends"]
LIMITS: dict[str, int] = _facts["limits"]
