"""The quantised formats, for the wrappers of every room: names, numbers and block sizes."""

from __future__ import annotations

from enum import IntEnum

TILE_ROWS = 16  # of a packed matrix, see csrc/format/layout.h


class QuantFormat(IntEnum):
    """The quantised formats of GGUF that our ops read, by GGML type number."""

    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights, in GGUF and packed."""
        weights, num_bytes = GGUF_BLOCKS[self]
        return k // weights * num_bytes


# Weights and bytes of a block, as csrc/format/layout.h has them.
GGUF_BLOCKS: dict[int, tuple[int, int]] = {
    QuantFormat.Q4_0: (32, 18),
    QuantFormat.Q4_1: (32, 20),
    QuantFormat.Q5_0: (32, 22),
    QuantFormat.Q5_1: (32, 24),
    QuantFormat.Q8_0: (32, 34),
    QuantFormat.Q4_K: (256, 144),
    QuantFormat.Q5_K: (256, 176),
    QuantFormat.Q6_K: (256, 210),
}


# A plain dict: torch.compile of torch 2.11 traces its lookup, but not an enum's.
_NUMBERS: dict[int | str, int] = {key: f.value for f in QuantFormat for key in (f.name, f.value)}


def format_number(format: int | str) -> int:
    """The GGML type number of a format given by name or number; the ops refuse a wrong number."""
    if (number := _NUMBERS.get(format)) is not None:
        return number
    if isinstance(format, str):
        raise ValueError(f"format must be one of {[f.name for f in QuantFormat]}, got {format}")
    return format
