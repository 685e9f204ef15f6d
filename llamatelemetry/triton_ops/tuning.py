"""Tiles and launches of the matrix kernels: measured rows where a GPU has them, else start values.

Rows stand in tuned/sm<capability>.json, written by ``llamatelemetry tune``, or start values of a
GPU that nobody had at hand, whose "measured_on" is null; a user's own, which win, in the file that
the environment names: LLAMATELEMETRY_TRITON_TUNED. "linear" rows are of layers, in 16 bits or of
a byte a value; "prefill" rows of attention over prompts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llamatelemetry.triton_ops.launch import (
    IS_INTERPRETED,
    has_tma,
    next_power_of_2,
    num_multiprocessors,
    shared_bytes_per_program,
)

FOLDER = Path(__file__).parent / "tuned"
VARIABLE = "LLAMATELEMETRY_TRITON_TUNED"
HOPPER_BYTES = 227 * 1024  # of shared memory that a program may have
_FEW_ROWS = 16  # rows of one tl.dot; fewer cost as much
_MOST_ROWS = 4096  # more are served as these are
_DEEP = 8192  # columns from which stream-K wins more than its parts cost


@dataclass(frozen=True)
class LinearConfig:
    """How linear_kernel is launched.

    Attributes:
        block_m, block_n, block_k: the tile; powers of two, at least 16.
        splits: parts of k, summed by a second kernel; 1 is one kernel.
        group_m: tiles of rows that run beside each other.
        tma: tiles are read by descriptors, where rows of 16-bit values begin at 16 bytes; splits
            is 1.
        stream: programs of a multiprocessor that share the steps of k of all tiles evenly
            (stream-K), of tma; 0: a program takes whole tiles.
    """

    block_m: int = 16
    block_n: int = 32
    block_k: int = 128
    splits: int = 1
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    tma: bool = False
    stream: int = 0


@dataclass(frozen=True)
class AttentionConfig:
    """How attention_kernel is launched; splits: parts of the keys; tma: keys and values are read
    by descriptors where they can be."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 1
    tma: bool = False


@dataclass(frozen=True)
class LinearShape:
    """What a row of the table is for.

    Attributes:
        m: rows, rounded up to 16 or a power of two up to 4096.
        n, k: outputs and inputs; of a gated layer n outputs of 2 n rows of weight.
    """

    m: int
    n: int
    k: int
    gated: bool = False

    @classmethod
    def of(cls, m: int, n: int, k: int, gated: bool) -> LinearShape:
        """The row that serves so many rows of x."""
        return cls(min(next_power_of_2(m, _FEW_ROWS), _MOST_ROWS), n, k, gated)


def shared_bytes_of(config: LinearConfig, shape: LinearShape, bytes_of_value: int) -> int:
    """Shared memory that a launch asks for at most: the stages of its tiles."""
    columns = config.block_n * (2 if shape.gated else 1)
    return (config.block_m + columns) * config.block_k * bytes_of_value * config.num_stages


def start_value(
    shape: LinearShape, bytes_of_value: int, multiprocessors: int, shared_bytes: int = HOPPER_BYTES
) -> LinearConfig:
    """A launch for a shape that nobody measured.

    Args:
        bytes_of_value: 2 or 4.
        multiprocessors: of the GPU.
        shared_bytes: that a program may have there: 227 KiB of an H200, 163 of an A100, 99 of
            compute capability 8.6 and 8.9, 64 of a T4.
    """
    config = _wide_start_value(shape, bytes_of_value, multiprocessors)
    while shared_bytes_of(config, shape, bytes_of_value) > shared_bytes:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > 32:
            config = replace(config, block_k=config.block_k // 2)
        else:
            config = replace(config, block_n=config.block_n // 2)
    return config


def tma_value(shape: LinearShape, multiprocessors: int, bytes_of_value: int = 2) -> LinearConfig:
    """A launch for more than 128 rows that nobody measured, on a GPU with descriptors."""
    block_k = 128 // bytes_of_value
    if shape.gated:
        return LinearConfig(128, 128, block_k, 1, 8, 8, 3, tma=True)
    if bytes_of_value == 1:
        return LinearConfig(256, 128, block_k, 1, 8, 8, 3, tma=True)
    tiles = -(-shape.m // 128) * -(-shape.n // 128)
    wide_tiles = -(-shape.m // 128) * -(-shape.n // 256)
    if 2 * -(-wide_tiles // multiprocessors) <= -(-tiles // multiprocessors):  # as many turns
        return LinearConfig(128, 256, block_k, 1, 8, 8, 3, tma=True)
    if 2 * tiles <= multiprocessors and shape.k >= _DEEP:
        return LinearConfig(128, 128, block_k, 1, 8, 8, 4, tma=True, stream=1)
    return LinearConfig(128, 128, block_k, 1, 8, 4, 4, tma=True)


def _wide_start_value(
    shape: LinearShape, bytes_of_value: int, multiprocessors: int
) -> LinearConfig:
    """Where shared memory is no matter."""
    m, n, k = shape.m, shape.n, shape.k
    if bytes_of_value == 4:  # float32 has no tensor cores here: small tiles of registers
        side = 64 if m > 16 else 16
        return LinearConfig(min(side, m), 32, 32, group_m=8, num_warps=4, num_stages=2)
    if m <= 32:
        # Enough programs to ask all memory at once: narrow tiles, and parts of k where n is small.
        block_n = 16 if n <= 16 * 4 * multiprocessors else 32
        programs = -(-n // block_n)
        splits = 1
        while programs * splits * 2 <= 2 * multiprocessors and k // (splits * 2) >= 512:
            splits *= 2
        return LinearConfig(m, block_n, 256, splits, 8, 4, 4)
    if m <= 64:
        return LinearConfig(64, 64, 128, 1, 8, 4, 4)
    if m <= 256 or shape.gated:
        return LinearConfig(128, 128, 64, 1, 8, 8, 3 if shape.gated else 4)
    return LinearConfig(128, 256, 64, 1, 8, 8, 3)


def table_of(text: str, where: str) -> dict[tuple[LinearShape, str], LinearConfig]:
    """The rows of a tuned file.

    Raises:
        ValueError: For what is no such file, naming it and what is wrong.
    """
    try:
        rows = json.loads(text)["linear"]
        return {
            (_made(LinearShape, row["shape"]), row["dtype"]): _made(LinearConfig, row["config"])
            for row in rows
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: must hold the rows that `llamatelemetry tune` writes, got {error!r}"
        ) from error


def prefill_rows(text: str, where: str) -> dict[tuple[int, str], dict[str, Any]]:
    """Of a tuned file, by head_dim and kind of values: the fields of an AttentionConfig.

    Raises:
        ValueError: As of table_of.
    """
    try:
        rows = json.loads(text).get("prefill", [])
        return {
            (int(row["head_dim"]), row["dtype"]): asdict(_made(AttentionConfig, row["config"]))
            for row in rows
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: must hold the rows that `llamatelemetry tune` writes, got {error!r}"
        ) from error


def _made(kind: Any, given: Mapping[str, Any]) -> Any:
    """A kind of these fields.

    Raises:
        TypeError: For names or types that are not its own.
    """
    made = kind(**given)
    for field in fields(made):
        value = getattr(made, field.name)
        if type(value).__name__ != field.type:
            raise TypeError(f"{field.name} must be of type {field.type}, got {value!r}")
    return made


def row_of(shape: LinearShape, dtype: str, config: LinearConfig, us: float) -> dict[str, Any]:
    """A row of a tuned file; us: microseconds that it took, weights out of L2."""
    return {"shape": asdict(shape), "dtype": dtype, "config": asdict(config), "us": round(us, 2)}


def named(key: Any) -> str:
    """What is measured, in words."""
    if isinstance(key, int):
        return f"prompts of head_dim {key}"
    shape, kind = key
    gated = ", gated" if shape.gated else ""
    return f"{shape.m} rows by {shape.n} x {shape.k}{gated} in {kind}"


def _files(capability: tuple[int, int]) -> list[Path]:
    """Of a GPU, the last wins."""
    shipped = FOLDER / f"sm{capability[0]}{capability[1]}.json"
    paths = [shipped] if shipped.exists() else []
    if own := os.environ.get(VARIABLE):
        paths.append(Path(own))
        if not paths[-1].exists():
            raise ValueError(f"{VARIABLE} must name a file, got {own!r}")
    return paths


@cache
def _table(capability: tuple[int, int]) -> Mapping[tuple[LinearShape, str], LinearConfig]:
    rows: dict[tuple[LinearShape, str], LinearConfig] = {}
    for path in _files(capability):
        rows |= table_of(path.read_text(), path.name)
    return rows


@cache
def _prefill_table(capability: tuple[int, int]) -> Mapping[tuple[int, str], dict[str, Any]]:
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for path in _files(capability):
        rows |= prefill_rows(path.read_text(), path.name)
    return rows


def prefill_fields(q: torch.Tensor) -> dict[str, Any] | None:
    """What attention over prompts is tuned to, as fields of AttentionConfig; None if it is not."""
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return None
    return _prefill_table(torch.cuda.get_device_capability(q.device)).get((q.shape[-1], "16-bit"))


def linear_config(
    m: int, n: int, k: int, gated: bool, dtype: torch.dtype, device: torch.device
) -> LinearConfig:
    """What a linear layer is launched with."""
    shape = LinearShape.of(m, n, k, gated)
    if device.type == "cuda":
        rows = _table(torch.cuda.get_device_capability(device))
        kinds = {4: ("float32",), 2: ("16-bit",), 1: ("8-bit", "16-bit")}[dtype.itemsize]
        if len(kinds) > 1 and shape.m > 32:  # tiles in 16 bits serve few rows alone
            kinds = kinds[:1]
        if (found := next(filter(None, map(rows.get, product((shape,), kinds))), None)) is not None:
            return found
    if IS_INTERPRETED and n * k > 2**17:  # it takes as long for a small tile as for a large one
        return LinearConfig(min(shape.m, 128), 1024, 1024)
    shared = shared_bytes_per_program(device)
    if dtype.itemsize <= 2 and shape.m > 128 and has_tma(device):
        config = tma_value(shape, num_multiprocessors(device), dtype.itemsize)
        if shared_bytes_of(config, shape, dtype.itemsize) <= shared:
            return config
    return start_value(shape, dtype.itemsize, num_multiprocessors(device), shared)
