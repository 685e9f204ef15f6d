"""The inputs of one forward, from what the host knows: the only place that builds a StepInput."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llamatelemetry.models.step_input import StepInput
from llamatelemetry.ops import slot_mapping


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sequence that one forward runs on: a piece of a prompt, or the last token.

    Attributes:
        tokens: at least one.
        begin: position of the first; the keys of all before it are in the cache.
        table: blocks of the sequence, in order.
    """

    tokens: Sequence[int]
    begin: int
    table: Sequence[int]


def put(values: Sequence[object], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Numbers of the host as a tensor of the device, which the host does not wait for."""
    tensor = torch.tensor(values, dtype=dtype)
    return moved(tensor, device) if torch.device(device).type == "cuda" else tensor


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host as one of the device, which the host does not wait for and which does
    not change with it."""
    if torch.device(device).type != "cuda":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_until_read(tensors: Iterable[Tensor]) -> None:
    """The memory of tensors that were perhaps made on another stream of a GPU is not given away
    before the current one is through with what it was given."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def take_ids(input_ids: Tensor, rows: Sequence[int], places: Sequence[tuple[Tensor, int]]) -> None:
    """Puts tokens in place that the host has not seen.

    Args:
        input_ids: [num_tokens] int64.
        rows: where they go.
        places: of each the tensor on the device that holds it, and where in it.
    """
    sources = {id(tensor): tensor for tensor, _ in places}
    begins = dict(
        zip(sources, accumulate((len(s) for s in sources.values()), initial=0), strict=False)
    )
    found = [begins[id(tensor)] + index for tensor, index in places]
    keep_until_read(sources.values())
    where = put([rows, found], torch.int64, input_ids.device)
    # A row without a token, which -1 stands for, goes on until the host has seen it.
    ids = torch.cat(list(sources.values())).index_select(0, where[1]).clamp_(min=0)
    input_ids.index_copy_(0, where[0], ids)


def table_of(chunks: Sequence[Chunk], width: int) -> Tensor:
    """The blocks of each chunk on the host, [batch, width] int32, with -1 after the last."""
    rows = [[*chunk.table, *[-1] * (width - len(chunk.table))] for chunk in chunks]
    return torch.tensor(rows, dtype=torch.int32).view(len(chunks), width)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, where the device is one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Steps run in the model's own dtype; where no autocast is on, nothing is entered for that."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def prepare(
    chunks: Sequence[Chunk],
    page_size: int,
    width: int,
    device: torch.device | str,
    slots_of: Callable[..., Tensor] = slot_mapping,
    table: Tensor | None = None,
) -> tuple[Tensor, StepInput]:
    """Packs chunks, of different sequences, into the tokens and the StepInput of one forward.

    A prefill and a decode step differ in nothing but the chunks: those of a decode step have one
    token each, which is never a sequence's first.

    Args:
        chunks: in the order of the sequences.
        page_size: tokens in a block.
        width: columns of the block table, at least the blocks of every chunk's table. The CPU's
            kernel splits its work by it, so it stays the same for all steps of a sequence.
        device: where the tensors go.
        slots_of: slot_mapping of the model's ops.
        table: what table_of gives, where the caller keeps it.

    Returns:
        input_ids [num_tokens] int64, and where they stand.
    """
    counts = [len(chunk.tokens) for chunk in chunks]
    positions = [range(chunk.begin, chunk.begin + len(chunk.tokens)) for chunk in chunks]
    table = table_of(chunks, width) if table is None else table
    step = StepInput(
        positions=put([p for run in positions for p in run], torch.int64, device),
        slot_mapping=torch.empty(0, dtype=torch.int64),
        block_table=moved(table, device),
        cache_seqlens=put([run.stop for run in positions], torch.int32, device),
        cu_seqlens_q=put([0, *accumulate(counts)], torch.int32, device),
        max_seqlen_q=max(counts, default=0),
        is_whole=all(chunk.begin == 0 for chunk in chunks),
    )
    step.slot_mapping = slots_of(step.positions, step.block_table, step.cu_seqlens_q, page_size)
    return put([token for chunk in chunks for token in chunk.tokens], torch.int64, device), step
