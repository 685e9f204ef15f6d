"""Small cases of attention over pages, a function and its tensors each, on the CPU.

One for each kernel of csrc/attention/decode, and for calls that two kernels share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from llamatelemetry import ops

Case = tuple[Any, ...]


def packed_call(
    queries: Sequence[int],
    keys: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    pages: tuple[int, int],
    table_pages: int | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Tensors of sequences whose tables name distinct pages, and -1 past their end.

    `heads` are those of queries and of keys, `pages` their number and the tokens of one; q and the
    caches come first, then the table, the lengths and the starts.
    """
    num_pages, page_size = pages
    width = table_pages or -(-max(keys) // page_size)
    table = torch.full((len(keys), width), -1, dtype=torch.int32)
    order = torch.randperm(num_pages, dtype=torch.int32)
    for row, count in enumerate(keys):
        used = -(-count // page_size)
        table[row, :used], order = order[:used], order[used:]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    caches = torch.randn(2, num_pages, page_size, heads[1], head_dim)
    q = torch.randn(sum(queries), heads[0], head_dim)
    return (q, *caches), (table, torch.tensor(keys, dtype=torch.int32), starts)


def decode(options: dict[str, Any], max_queries: int) -> Callable[..., object]:
    """A call in half precision, by `backend` on a GPU alone; sinks and slopes may follow."""

    def run(q: Tensor, k: Tensor, v: Tensor, *where: Tensor) -> object:
        terms = dict(zip(("sinks", "alibi_slopes"), where[3:], strict=False))
        named = options if q.is_cuda else {**options, "backend": None}
        args = (q.half(), k.half(), v.half(), *where[:3])
        return ops.paged_attention(*args, max_seqlen_q=max_queries, **terms, **named)

    return run


def decode_case(options: dict[str, Any]) -> Case:
    """Two sequences, with sinks and ALiBi."""
    q_and_caches, where = packed_call((2, 1), (170, 9), (6, 2), 24, (90, 4))
    return (decode(options, 2), *q_and_caches, *where, torch.randn(6), torch.rand(6))


def one_sequence(head_dim: int) -> Case:
    """Clusters of 16 blocks."""
    q_and_caches, where = packed_call((1,), (300,), (16, 8), head_dim, (80, 4))
    return (decode({}, 1), *q_and_caches, *where)


def clusters_of_8(head_dim: int) -> Case:
    q_and_caches, where = packed_call((1,), (300,), (32, 16), head_dim, (80, 4))
    return (decode({}, 1), *q_and_caches, *where)


def wide_case(head_dim: int) -> Case:
    """Tiles of 64 rows, of sequences of which one ends inside a tile and one has no key."""
    keys = (150, 64, 6, 0, *(20 + row for row in range(10)))
    q_and_caches, where = packed_call((6,) * len(keys), keys, (12, 4), head_dim, (90, 8))
    return (decode({}, 6), *q_and_caches, *where)


def clusters_of_64_rows(head_dim: int) -> Case:
    """Two sequences, of which one has keys for a single block."""
    q_and_caches, where = packed_call((6, 6), (150, 33), (32, 8), head_dim, (40, 8))
    return (decode({}, 6), *q_and_caches, *where)


def mixed_case(head_dim: int, **options: str | int) -> Case:
    """A chunk beside sequences of few queries, which have a launch of their own."""
    tensors = packed_call((20, 1, 2), (40, 900, 7), (6, 2), head_dim, (120, 8), table_pages=600)
    return (decode(options, 20), *tensors[0], *tensors[1])


def eight_bit(stored: torch.dtype, head_dim: int, queries: int = 2, **options: int) -> Case:
    """Over a cache of 8 bits that append_kv_ has written."""

    def run(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, *where: Tensor) -> object:
        shape = (2, 13, 7, 2, head_dim)
        caches = torch.zeros(shape, device=q.device).to(stored)
        scales = torch.zeros(shape[:-1], device=q.device)
        ops.append_kv_(k, v, *caches, slots, *scales)
        named = {"k_scales": scales[0], "v_scales": scales[1], **options}
        return ops.paged_attention(q.bfloat16(), *caches, *where, max_seqlen_q=queries, **named)

    return (
        run,
        torch.randn(queries + 1, 6, head_dim),
        *torch.randn(2, 91, 2, head_dim),
        torch.arange(91),
        torch.arange(13, dtype=torch.int32).view(1, 13).expand(2, -1).contiguous(),
        torch.tensor([80, 9], dtype=torch.int32),
        torch.tensor([0, queries, queries + 1], dtype=torch.int32),
    )


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"paged decode, {options}": partial(decode_case, options)
        for options in (
            *({}, {"split_size": 64}, {"num_splits": 2}, {"window_size": (70, 0)}),
            *({"backend": "decode_sm75", **splits} for splits in ({}, {"split_size": 64})),
        )
    },
    **{
        f"paged decode, {what.__name__}, {head_dim}": partial(what, head_dim)
        for what, head_dim in product(
            (one_sequence, clusters_of_8, wide_case, clusters_of_64_rows, mixed_case), (64, 128)
        )
    },
    **{
        f"paged decode, beside a chunk, split_size, {backend}": partial(
            mixed_case, 64, split_size=64, backend=backend
        )
        for backend in ("decode", "decode_sm75")
    },
    **{
        f"paged decode, cache of {stored}, {head_dim}": partial(eight_bit, stored, head_dim)
        for stored, head_dim in product((torch.float8_e4m3fn, torch.int8), (24, 48, 128, 160))
    },
    **{
        f"paged decode, a chunk over {stored}, split_size": partial(
            eight_bit, stored, 128, 20, split_size=64
        )
        for stored in (torch.float8_e4m3fn, torch.int8)
    },
}
