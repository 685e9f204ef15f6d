"""The quantised formats, for the wrappers of every room: names, GGML numbers, block sizes."""

from __future__ import annotations

from enum import Enum

from llamatelemetry._native.facts import FORMATS, LIMITS, FormatFacts

TILE_ROWS = LIMITS["tile_rows"]  # of a packed matrix, see csrc/format/layout.h


class QuantFormat(str, Enum):
    """The quantised formats that our ops read; a member is its name, ``QuantFormat(2)`` is Q4_0.

    All that is known of one beyond its name comes from the library (csrc/format/format.h).
    """

    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"
    Q2_K = "Q2_K"
    Q3_K = "Q3_K"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    MXFP4 = "MXFP4"
    TQ1_0 = "TQ1_0"
    TQ2_0 = "TQ2_0"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> QuantFormat | None:
        return next((f for f in cls if f.facts.ggml_type == value), None)

    @property
    def facts(self) -> FormatFacts:
        return FORMATS[self.value]

    @property
    def block_size(self) -> int:
        """Weights of a block."""
        return self.facts.block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, in GGUF and packed."""
        return self.facts.block_bytes

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights, in GGUF and packed."""
        return k // self.block_size * self.block_bytes


# By GGML type number.
GGUF_FORMATS: dict[int, QuantFormat] = {
    facts.ggml_type: QuantFormat(name)
    for name, facts in FORMATS.items()
    if facts.ggml_type is not None
}

# A plain dict: torch.compile of torch 2.11 traces its lookup, but not an enum's.
_NAMES: dict[int | str, str] = {name: name for name in FORMATS}
_NAMES.update({number: format.value for number, format in GGUF_FORMATS.items()})


def format_facts(op: str, name: str) -> FormatFacts:
    """For the fakes of the ops, which refuse an unknown format as the ops themselves do."""
    if name not in FORMATS:
        raise RuntimeError(f"{op}: format must be one of {{{', '.join(FORMATS)}}}, got {name}")
    return FORMATS[name]


def format_name(format: QuantFormat | int | str) -> str:
    """What the ops call a format given by member, name or GGML number; they refuse a wrong one."""
    if (name := _NAMES.get(format)) is not None:
        return name
    return str(format)
